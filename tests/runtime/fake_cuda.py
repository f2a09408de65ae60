"""Makes the CUDA and the TensorRT for tests (`fake_tensorrt/`) those of a process."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from compressor.runtime.backends.tensorrt import INTERPRETER

FAKE = Path(__file__).parent / "fake_tensorrt"


def environment(folder, python, version="8.6.1"):
    """Variables for a process whose TensorRT, run by `python`, is the one for tests; libraries are built in `folder`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: the CUDA for tests cannot be built")
    for name in ("libcuda.so.1", "libcudart.so"):
        if not (folder / name).exists():
            subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / name, FAKE / "cuda.c"], check=True)
    return {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}", "COMPRESSOR_CUDART": str(folder / "libcudart.so"),
        "PYTHONPATH": str(FAKE), INTERPRETER: str(python), "FAKE_TENSORRT": version,
    }  # fmt: skip
