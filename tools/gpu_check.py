"""The steps of gpu_check.sh, each in a process of its own with a time limit; see there."""

import argparse
import contextlib
import importlib
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import gpu_plan  # noqa: E402 - beside this file, not installed

NEEDED = (
    "torch", "torchvision", "numpy", "scipy", "onnx", "onnxscript", "onnx_ir", "onnx_graphsurgeon", "onnxruntime", "optuna",
    "sqlalchemy", "alembic", "tensorly", "safetensors", "typer", "rich",
)  # fmt: skip
STEPS = {
    name: f"gpu_steps:{name.replace('-', '_')}"
    for name in (
        "latency", "compress", "compensation", "fine-tune", "latency-model", "staircase", "conformance",
        "factorization", "search",
    )
} | {"compile": "gpu_steps:compiled", "tensorrt": "gpu_tensorrt:tensorrt", "tensorrt-rtx": "gpu_tensorrt:tensorrt_rtx"}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the plan and what travels; nothing runs")
    parser.add_argument("--call", type=int, help="a call of the plan: its steps and limits")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results")
    parser.add_argument("--data", type=Path, help="cifar10.tar.xz and resnet56.safetensors, for the fine-tuning")
    parser.add_argument("--seconds", type=float, default=900.0, help="for all steps together")
    parser.add_argument("--only", default="", help="names of steps, joined by commas")
    parser.add_argument("--dry", action="store_true", help="small and on the CPU: tries the script, measures nothing worth keeping")
    arguments = parser.parse_args()
    if arguments.plan:
        text, fits = gpu_plan.plan()
        print(text)
        sys.exit(0 if fits else "gpu_check: this does not fit")
    unknown = {item.split(":")[0] for item in arguments.only.split(",") if item} - set(STEPS)
    if unknown:
        sys.exit(f"gpu_check: no steps {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_check: this Python ({platform.python_version()}) lacks {', '.join(missing)}; carry their wheels (--wheels)")
    check(arguments)


def check(arguments):
    os.environ.setdefault("COMPRESSOR_CACHE", str(arguments.out / "cache"))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks without making CUDA unusable after a fork
    shared = gpu_plan.CALLS[arguments.call - 1].networks if arguments.call else "resnet50,mobilenet_v2,resnet56"
    os.environ["GPU_CHECK_NETWORKS"] = "resnet20" if arguments.dry else shared
    import torch

    if not torch.cuda.is_available() and not arguments.dry:
        print(f"gpu_check: no GPU is visible to torch {torch.__version__}; every step is skipped (--dry tries them on the CPU)")
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_networks", "gpu_steps"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    about = step("environment", arguments, 120.0, context, lambda rows: None)
    if about["status"] != "ok":
        sys.exit(f"gpu_check: {about['reason']}")
    results = {"environment": about["rows"][0], "dry": arguments.dry, "steps": {}}
    device = "dry" if arguments.dry else results["environment"]["device"]
    label = "".join(c if c.isalnum() else "-" for c in str(device)).lower()
    path = arguments.out / f"gpu-{label}{f'-call{arguments.call}' if arguments.call else ''}.json"

    def keep():
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, path)

    deadline = begun + arguments.seconds
    for name, limit in asked(arguments):
        left = deadline - time.monotonic()
        print(f"== {name} ({left:.0f} s left)", flush=True)
        if left < 5:
            results["steps"][name] = {"status": "no time left", "rows": []}
            keep()
            continue
        entry = results["steps"][name] = {"status": "cut off", "reason": "the machine went away", "rows": []}
        keep()

        def kept(row, entry=entry):
            entry["rows"].append(row)
            keep()

        found = step(name, arguments, min(left, limit), context, kept)
        results["steps"][name] = found
        keep()
    from gpu_table import table

    print(table(results))
    if any(found["status"] == "failed" for found in results["steps"].values()):
        sys.exit(1)


def asked(arguments):
    """Names and limits: of the call, of `--only`, or of everything."""
    planned = [(step.name, float(step.seconds)) for call in gpu_plan.CALLS for step in call.steps]
    if arguments.call:
        planned = [(step.name, float(step.seconds)) for step in gpu_plan.CALLS[arguments.call - 1].steps]
    if arguments.only:
        own = dict((*item.split(":"), "")[:2] for item in arguments.only.split(","))  # a name, or name:seconds
        known = {**dict.fromkeys(STEPS, 60.0), **dict(planned)}
        return [(name, float(seconds or (600.0 if arguments.dry else known[name]))) for name, seconds in own.items()]
    return [(name, 600.0 if arguments.dry else limit) for name, limit in planned]


def step(name, arguments, limit, context, kept):
    """Run one step in its own process: a CUDA fault or a hang costs that step only."""
    queue = context.Queue()
    arguments.limit = limit
    process = context.Process(target=_in_process, args=(name, arguments, queue))
    begun, rows, where, found = time.monotonic(), [], [], None
    process.start()
    while found is None:
        try:
            kind, value = queue.get(timeout=0.2)
        except Empty:
            late = time.monotonic() - begun >= limit
            if process.is_alive() and not late:
                continue
            why = f"stopped after {limit:.0f} s; rows so far are kept" if late else f"a crash (exit code {process.exitcode})"
            kind, value = "end", {"status": "stopped" if late else "failed", "reason": why}
        if kind == "row":
            rows.append(value)
            kept(value)
        elif kind == "where":
            where = value
        else:
            found = value
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # its children too
    process.join(10)
    return {**found, "rows": rows, "seconds": round(time.monotonic() - begun, 1), "where": where}


def _in_process(name, arguments, queue):
    os.setsid()
    import gpu_steps
    from gpu_where import watch

    watch(lambda lines: queue.put(("where", lines)))
    try:
        gpu_steps.begin(arguments)
        module, _, function = STEPS.get(name, f"gpu_steps:{name}").partition(":")
        for row in getattr(importlib.import_module(module), function)(arguments):
            queue.put(("row", row))  # what is measured is kept, whatever happens next
        found = {"status": "ok"}
    except gpu_steps.Skip as reason:
        found = {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "log": traceback.format_exc()[-3000:]}
    queue.put(("end", found))
    queue.close()
    queue.join_thread()
    os._exit(0)  # threads of libraries may not end


def environment():
    """Versions, device and driver."""
    import torch

    from compressor.runs.folder import versions

    found = {**versions(), "device": "cpu", "processor": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        from compressor.runtime.backends.pytorch import gpu

        found |= gpu()
        query = "name,driver_version,power.limit,clocks.max.sm,temperature.gpu,compute_mode,mig.mode.current"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            found["nvidia_smi"] = "not there"
        found.setdefault("driver", found["nvidia_smi"].split(", ")[1] if ", " in found["nvidia_smi"] else "unknown")
    return found


if __name__ == "__main__":
    main()
