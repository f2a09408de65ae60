"""What `gpu_check.py` runs, one function per step; each yields rows."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SESSION = {"sample_s": 2e-3, "half_width": 0.005, "max_s": 2.0}


class Skip(Exception):  # noqa: N818 - not an error
    """A step has nothing to do here."""


def target_of(arguments, batch=1, precision="fp16", mode="cudagraph"):
    import compressor

    if arguments.dry:
        return compressor.Target("torch", batch=batch, precision="fp32")
    options = {"device": "cuda", "mode": mode, "channels_last": precision != "fp32"}
    return compressor.Target("torch", batch=batch, precision=precision, options=options)


def networks(arguments):
    from bench_latency_model import network

    if arguments.dry:
        return {"resnet56": network("resnet56", 32)}
    return {name: network(name, 224) for name in ("resnet50", "mobilenet_v2")}


def pruned(graph, ratio):
    import compressor
    from compressor.passes.remove_channels import RemoveChannels

    channels = compressor.analyze(graph)
    return RemoveChannels(channels.plan(ratio), channels)(graph).graph


def protocol(arguments):
    from compressor.runtime.timing import Protocol

    return Protocol(warm_up_s=0.02, settle_s=0.1, max_samples=30, max_s=1.0) if arguments.dry else Protocol(**SESSION)


def row_of(name, target, found):
    low, high = found.interval_ms
    return {
        "network": name, "backend": target.backend, "precision": target.precision, "batch": target.batch,
        "options": dict(target.options), "median_ms": found.median_ms, "ci95": [low, high],
        "status": found.status, "n": len(found.times_ms),
        "details": {k: v for k, v in found.details.items() if k in ("clocks", "noise_floor", "enqueue_ms", "host_ms", "warnings")},
    }  # fmt: skip


def conformance(arguments):
    """The suite that every back end passes, with the GPU's back ends in it."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-o",
        "timeout=0",
        "tests/conformance",
    ]
    if importlib.util.find_spec("pytest_timeout") is None:
        command[-3:-1] = []
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = found.stdout.strip().splitlines()
    print("\n".join(lines[-15:]))
    if found.returncode:
        raise RuntimeError(lines[-1] if lines else found.stderr[-300:])
    return [{"summary": lines[-1]}]


def torch_latency(arguments):
    """ResNet-50 and MobileNetV2, base and pruned, by batch and precision; modes of PyTorch against each other."""
    from compressor.runtime.latency import measure

    for name, graph in networks(arguments).items():
        variants = {
            f"{name} {round(100 * r)} % removed" if r else name: pruned(graph, r) if r else graph for r in (0, 0.25, 0.5, 0.75)
        }
        for batch in (1, 8, 32)[: 1 if arguments.dry else 3]:
            target = target_of(arguments, batch)
            yield from [row_of(n, target, m) for n, m in measure(variants, target, protocol=protocol(arguments)).items()]
        for precision, mode in (("fp32", "cudagraph"), ("fp16", "eager"), ("bf16", "cudagraph"))[: 1 if arguments.dry else 3]:
            target = target_of(arguments, 8, precision, mode)
            yield from [row_of(n, target, m) for n, m in measure({name: graph}, target, protocol=protocol(arguments)).items()]


def staircase(arguments):
    """Right edges of one early and one late group at FP16."""
    import compressor
    from compressor.runtime.staircase import measure_staircase

    for name, graph in networks(arguments).items():
        channels = compressor.analyze(graph)
        chosen = [g for g in channels.free if g.size >= 16]
        for group in (chosen[1], chosen[-2])[: 1 if arguments.dry else 2]:
            try:
                found = measure_staircase(
                    channels, group, target_of(arguments, 8), protocol(arguments), most=6 if arguments.dry else 40
                )
            except compressor.BackendError as error:
                yield {"network": name, "group": group.name, "reason": str(error)}
                continue
            yield {"network": name, "group": found.group, "widths": found.widths, "ms": found.ms, "edges": found.edges}
            print(f"{name} {found.group}: edges {found.edges}", flush=True)


def latency_model(arguments):
    """Error of the latency model on engines that it has not seen, at FP16."""
    import bench_latency_model

    from compressor.progress import Progress
    from compressor.runtime.store import MeasurementStore

    for name in ("resnet56",) if arguments.dry else ("resnet50", "mobilenet_v2", "resnet56"):
        size, counts = (32, (8, 6)) if arguments.dry else (32 if name == "resnet56" else 224, (40, 60))
        target = target_of(arguments, 8)
        store = MeasurementStore(arguments.out / "cache" / "latency.sqlite")
        found, lines = bench_latency_model.run(name, size, target, *counts, store, Progress())
        if not arguments.dry:
            path = arguments.out / f"latency-model-{name}-torch-cudagraph-fp16.json"
            path.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        yield found


def tensorrt(arguments):
    """Real TensorRT: parity, latency against PyTorch's CUDA graph in the same run, time per layer."""
    import compressor
    from compressor.profiling import Network, profile_network
    from compressor.runtime import BACKENDS

    health = BACKENDS["tensorrt"]().check()
    print(health.detail)
    if not health.works:
        raise Skip(f"{health.detail}; {health.remedy}")
    for name, graph in networks(arguments).items():
        for label, variant in ((name, graph), (f"{name} 50 % removed", pruned(graph, 0.5))):
            targets = [compressor.Target("tensorrt", batch=b, precision=p) for p in ("fp32", "fp16") for b in (1, 8)]
            for found in profile_network(Network(label, graph=variant), targets, layers=True, protocol=protocol(arguments)):
                row = {"network": label, "precision": found.target.precision, "batch": found.target.batch, "status": found.status}
                row |= {"failure": found.failure, "parity": found.parity, "memory": dict(found.memory), "build_s": found.build_s}
                if found.measurement is not None:
                    row |= row_of(label, found.target, found.measurement)
                    layers = sorted(found.layers, key=lambda layer: -layer.median_ms)
                    row["layer_sum_ms"] = sum(layer.median_ms for layer in layers)
                    row["layers"] = [[layer.name, layer.kind, layer.median_ms, list(layer.modules)] for layer in layers[:20]]
                yield row
                print(label, found.target.precision, found.target.batch, found.measurement or found.failure, flush=True)


def tensorrt_rtx(arguments):
    """TensorRT-RTX: does it run on this device at all?"""
    from compressor.profiling import Network, profile_network
    from compressor.runtime import BACKENDS
    from compressor.target import Target

    health = BACKENDS["tensorrt-rtx"]().check()
    if not health.works:
        raise Skip(f"{health.detail}; {health.remedy}")
    name, graph = next(iter(networks(arguments).items()))
    (found,) = profile_network(Network(name, graph=graph), [Target("tensorrt-rtx", precision="fp16")], protocol=protocol(arguments))
    return [
        {
            "network": name,
            "status": found.status,
            "failure": found.failure,
            "median_ms": found.measurement and found.measurement.median_ms,
        }
    ]


def compensation(arguments):
    """Compensation on the GPU against the same on the CPU: outputs, time, memory."""
    import torch

    import compressor
    from compressor.passes.calibration import Calibration
    from compressor.passes.compensate import Compensate
    from compressor.passes.compensation import Compensation

    (name, graph), *_ = networks(arguments).items()
    size = graph.meta["compressor.inputs"][0][0][-1]
    images = torch.randn(16 if arguments.dry else 64, 3, size, size, generator=torch.Generator().manual_seed(0))
    outputs, row = {}, {"network": name, "images": len(images)}
    for device in dict.fromkeys(("cpu", "cuda" if torch.cuda.is_available() else "cpu")):
        network = graph.to(device)
        channels = compressor.analyze(network)
        plan = channels.plan(0.5)
        small = compressor.apply(plan, network, channels=channels)
        calibration = Calibration(tuple((batch,) for batch in images.split(16)))
        begun = time.monotonic()
        found = Compensate(channels, plan, calibration, Compensation(positions=8)).run(small).graph.eval()
        row[f"{device}_s"] = time.monotonic() - begun
        with torch.no_grad():
            outputs[device] = found(images[:8].to(device)).cpu()
    if "cuda" in outputs:
        row["relative_difference"] = float((outputs["cuda"] - outputs["cpu"]).norm() / outputs["cpu"].norm())
        row["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return [row]


def search(arguments):
    """What a candidate of a search is worth, judged on the GPU and on the CPU, and how many it judges in a minute."""
    import torch

    import compressor
    from compressor.fitness import Fitness, Judge
    from compressor.passes.calibration import Calibration

    (name, graph), *_ = networks(arguments).items()
    size = graph.meta["compressor.inputs"][0][0][-1]
    images = torch.randn(16 if arguments.dry else 256, 3, size, size, generator=torch.Generator().manual_seed(0))
    row = {"network": name, "images": len(images)}
    for device in dict.fromkeys(("cpu", "cuda" if torch.cuda.is_available() else "cpu")):
        network = graph.to(device)
        channels = compressor.analyze(network)
        calibration = Calibration(tuple((batch,) for batch in images.split(16)))
        with torch.no_grad():
            labels = torch.cat([network(batch.to(device)).argmax(1).cpu() for batch in images.split(16)])
        holdout = list(zip(images.split(16), labels.split(16), strict=True))
        judge = Judge(channels, Fitness("compensate", images=len(images)), holdout, calibration)
        found = judge(channels.plan(0.3))
        row[f"{device}_loss"], row[f"{device}_per_minute"] = found.loss, 60 / found.seconds
    return [row]


def factorization(arguments):
    """Which forms are faster than the layers that they stand for, at half of a layer's MACs."""
    import compressor
    from compressor.passes.factorize_conv import factorizable, sizes_of
    from compressor.passes.forms import FORMS
    from compressor.passes.rank_choice import by_rate
    from compressor.runtime.pieces import choices

    for name, graph in networks(arguments).items():
        channels = compressor.analyze(graph)
        for form in list(FORMS.values())[: 1 if arguments.dry else None]:
            able = [layer for layer, reason in factorizable(graph, form).items() if reason is None]
            ranks = {
                layer: by_rate(form, sizes_of(graph.get_submodule(layer)), 0.5) for layer in able[1 :: 2 if arguments.dry else 8]
            }
            factors = [compressor.Factorization(layer, form.name, own) for layer, own in ranks.items() if own][:4]
            plan = compressor.Plan.keep({}, channels.digest, factors=factors)
            found = choices(channels, plan, target_of(arguments, 8), lambda _, work: work())
            for choice in found:
                print(f"{name} {form.name}: {choice}", flush=True)
            yield {"network": name, "form": form.name, "faster": sum(c.faster for c in found), "layers": [vars(c) for c in found]}
