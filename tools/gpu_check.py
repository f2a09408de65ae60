"""The steps of gpu_check.sh, each in a process of its own with a time limit; see there."""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from queue import Empty

sys.path.insert(0, str(Path(__file__).parent))
import gpu_steps
from gpu_steps import Skip
from gpu_table import table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEEDED = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnx_graphsurgeon",
    "onnxruntime",
    "optuna",
    "sqlalchemy",
    "alembic",
    "tensorly",
    "safetensors",
    "typer",
    "rich",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument("--only", default="", help="names of steps, joined by commas")
    parser.add_argument("--dry", action="store_true", help="small and on the CPU: tries the script, measures nothing worth keeping")
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_check: this Python ({platform.python_version()}) lacks {', '.join(missing)}; carry their wheels (--wheels)")
    import torch

    os.environ.setdefault("COMPRESSOR_CACHE", str(arguments.out / "cache"))
    if not torch.cuda.is_available() and not arguments.dry:
        print(f"gpu_check: no GPU is visible to torch {torch.__version__}; every step is skipped (--dry tries them on the CPU)")
        return
    chosen = [name for name in STEPS if name in (arguments.only or ",".join(STEPS)).split(",")]
    deadline = time.monotonic() + 60 * arguments.minutes
    results = {"environment": environment(), "dry": arguments.dry, "steps": {}}
    for name in chosen:
        left = deadline - time.monotonic()
        print(f"== {name} ({left:.0f} s left)", flush=True)
        results["steps"][name] = step(name, arguments, min(left, 60 * CAPS[name])) if left > 10 else {"status": "no time left"}
        label = (
            "dry" if arguments.dry else "".join(c if c.isalnum() else "-" for c in str(results["environment"]["device"])).lower()
        )
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"gpu-{label}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if any(found["status"] == "failed" for found in results["steps"].values()):
        sys.exit(1)


def environment():
    import torch

    from compressor.run import versions

    found = {**versions(), "device": "cpu", "processor": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        from compressor.runtime.pytorch import gpu

        found |= gpu()
        query = "name,driver_version,power.limit,clocks.max.sm,temperature.gpu,compute_mode,mig.mode.current"
        try:
            found["nvidia_smi"] = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            found["nvidia_smi"] = "not there"
        found.setdefault("driver", found["nvidia_smi"].split(", ")[1] if ", " in found["nvidia_smi"] else "unknown")
    return found


def step(name, arguments, limit):
    """Run one step in its own process: a CUDA fault or a hang costs that step only."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_process, args=(name, arguments, queue))
    begun, rows, found = time.monotonic(), [], None
    process.start()
    while found is None:
        try:
            kind, value = queue.get(timeout=0.5)
        except Empty:
            if process.is_alive() and time.monotonic() - begun < limit:
                continue
            kind, value = (
                "end",
                {"status": "failed", "reason": f"no end within {limit:.0f} s, or a crash (exit code {process.exitcode})"},
            )
        if kind == "row":
            rows.append(value)
        else:
            found = value
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # its children too
    process.join(10)
    return {**found, "rows": rows, "seconds": round(time.monotonic() - begun, 1)}


def _in_process(name, arguments, queue):
    os.setsid()
    try:
        for row in STEPS[name](arguments):
            queue.put(("row", row))  # what is measured is kept, whatever happens next
        found = {"status": "ok"}
    except Skip as reason:
        found = {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    queue.put(("end", found))
    queue.close()
    queue.join_thread()


STEPS = {
    "torch": gpu_steps.torch_latency,
    "compensation": gpu_steps.compensation,
    "search": gpu_steps.search,
    "factorization": gpu_steps.factorization,
    "tensorrt": gpu_steps.tensorrt,
    "staircase": gpu_steps.staircase,
    "latency-model": gpu_steps.latency_model,
    "conformance": gpu_steps.conformance,
    "tensorrt-rtx": gpu_steps.tensorrt_rtx,
}


CAPS = {
    "torch": 3,
    "compensation": 2,
    "search": 2,
    "factorization": 2,
    "tensorrt": 4,
    "staircase": 2,
    "latency-model": 6,
    "conformance": 3,
    "tensorrt-rtx": 1,
}  # minutes


if __name__ == "__main__":
    main()
