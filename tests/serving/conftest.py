"""A real tritonserver, from the wheel of nvidia-pytriton in an environment of its own (it wants numpy 1)."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("COMPRESSOR_TRITON_VENV", ROOT / ".venv-triton"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def triton(tmp_path_factory):
    """A function that serves a repository and yields the address of its gRPC port."""
    sites = sorted(ENVIRONMENT.glob("lib/python*/site-packages"))
    if not sites or not (sites[0] / "pytriton").is_dir():
        pytest.skip(f"no tritonserver: {ENVIRONMENT} holds no nvidia-pytriton (make .venv-triton/ready)")
    site, server = sites[0], sites[0] / "pytriton" / "tritonserver"
    backends = tmp_path_factory.mktemp("backends")
    shutil.copytree(server / "backends" / "python", backends / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(Path(__file__).with_name("onnxruntime_backend.py"), backends / "onnxruntime" / "model.py")
    libraries = [
        str(p) for p in (*site.glob("nvidia_pytriton.libs"), server / "external_libs", Path(sys.base_prefix) / "lib") if p.exists()
    ]
    # The embedded interpreter ignores PYTHONPATH, and finds its packages by the python3 that it sees first.
    path = f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": ":".join(libraries)}

    @contextlib.contextmanager
    def start(repository):
        http, grpc = free_port(), free_port()
        command = [
            str(server / "bin" / "tritonserver"), "--model-repository", str(repository), "--backend-directory", str(backends),
            "--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1", "--http-port", str(http), "--grpc-port", str(grpc),
            "--allow-metrics", "false", "--exit-timeout-secs", "5",
        ]  # fmt: skip
        log = tmp_path_factory.mktemp("server") / "log"
        with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
            try:
                wait(process, grpc, log)
                yield f"127.0.0.1:{grpc}"
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                process.kill()

    return start


def wait(process, port, log):
    from tritonclient import grpc

    deadline = time.monotonic() + 60
    with grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(grpc.InferenceServerException):
                if client.is_server_ready():
                    return
            time.sleep(0.2)
    errors = "\n".join(
        line for line in log.read_text().splitlines() if line.startswith(("E", "W", "error")) or "UNAVAILABLE" in line
    )
    raise AssertionError(f"the server does not become ready:\n{errors}")
