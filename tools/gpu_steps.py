"""What `gpu_check.py` runs, one function per step; each yields rows."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gpu_networks import Said, graph_of

ROOT = Path(__file__).resolve().parent.parent
SESSION = {"sample_s": 2e-3, "half_width": 0.005, "max_s": 1.0, "settle_s": 1.0}
NETWORKS = ("resnet50", "mobilenet_v2", "resnet56")


class Skip(Exception):  # noqa: N818 - not an error
    """A step has nothing to do here."""


def target_of(arguments, batch=1, precision="fp16", mode="cudagraph"):
    import compressor

    if arguments.dry:
        return compressor.Target("torch", batch=batch, precision="fp32")
    options = {"device": "cuda", "mode": mode, "channels_last": precision != "fp32"}
    return compressor.Target("torch", batch=batch, precision=precision, options=options)


def networks(arguments, names=NETWORKS):
    """Names and traced networks, where they are compared: a ResNet-50 at batch 32 takes seconds on a CPU."""
    for name in ("resnet20",) if arguments.dry else names:
        yield name, on_gpu(graph_of(name), arguments)


def begin(arguments):
    """What a forked step does first."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    arguments.begun = time.monotonic()
    if not arguments.dry:
        torch.cuda.init()


def left_s(arguments):
    return arguments.limit - (time.monotonic() - arguments.begun)


def environment(arguments):
    """Versions, device and driver."""
    del arguments
    import gpu_check

    return [gpu_check.environment()]


def on_gpu(graph, arguments):
    """A copy where training and statistics run."""
    import torch

    from compressor.passes.tracing.trace import moved, quiet_deepcopy

    return graph if arguments.dry else moved(quiet_deepcopy(graph), torch.device("cuda"))


def pruned(graph, ratio):
    import compressor
    from compressor.passes.transforms.remove_channels import RemoveChannels

    channels = compressor.analyze(graph)
    return RemoveChannels(channels.plan(ratio), channels)(graph).graph


def protocol(arguments):
    from compressor.runtime.timing.protocol import Protocol

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
        "-p",
        "no:benchmark",  # it warns where tests run side by side, and warnings are errors here
        "-o",
        "addopts=",
        *(("-n", "4") if importlib.util.find_spec("xdist") else ()),
        *(("-o", "timeout=0") if importlib.util.find_spec("pytest_timeout") else ()),
        "--tb=short",
        "tests/gpu",
        "tests/conformance",
    ]
    with tempfile.TemporaryFile("w+") as log:
        with suppress(subprocess.TimeoutExpired):  # what was found so far is told
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=left_s(arguments) - 3, check=False)
        log.seek(0)
        lines = log.read().strip().splitlines()
    print("\n".join(lines[-80:]))
    if not lines or " failed" in lines[-1] or " passed" not in lines[-1]:
        raise RuntimeError(lines[-1] if lines else "nothing was said")
    return [{"summary": lines[-1]}]


def latency(arguments):
    """Base and pruned networks by batch and precision; modes of PyTorch against each other."""
    from compressor.runtime.measuring.measure import measure

    for name, graph in networks(arguments, NETWORKS[::-1]):
        shares = {r: pruned(graph, r) if r else graph for r in (0, 0.25, 0.5, 0.75)}
        variants = {f"{name} {round(100 * r)} % removed" if r else name: small for r, small in shares.items()}
        ends = {label: variants[label] for label in list(variants)[:3:2]}
        for batch, some in ((8, variants), (1, ends), (32, ends))[: 1 if arguments.dry else 3]:
            target = target_of(arguments, batch)
            yield from [row_of(n, target, m) for n, m in measure(some, target, protocol=protocol(arguments)).items()]
        for precision, mode in (("fp32", "cudagraph"), ("bf16", "cudagraph"), ("fp16", "eager"))[: 0 if arguments.dry else 3]:
            target = target_of(arguments, 8, precision, mode)
            yield from [row_of(n, target, m) for n, m in measure({name: graph}, target, protocol=protocol(arguments)).items()]


def compiled(arguments):
    """`torch.compile` beside the CUDA graph and eager mode; compiling counts."""
    from compressor.runtime.measuring.measure import measure

    for name, graph in networks(arguments, NETWORKS[:2]):
        target = target_of(arguments, 8, mode="compile")
        begun = time.monotonic()
        found = measure({name: graph}, target, protocol=protocol(arguments))[name]
        yield {**row_of(name, target, found), "seconds": time.monotonic() - begun}


def compress(arguments):
    """A real `compress` to half of the measured latency, without labels; then both engines anew in three sessions."""
    import torch

    import compressor
    from compressor.runtime.measuring.measure import measure

    name, graph = next(networks(arguments))
    size = graph.meta["compressor.inputs"][0][0][-1]
    images = torch.randn(64 if arguments.dry else 128, 3, size, size, generator=torch.Generator().manual_seed(0))
    target = target_of(arguments, 1 if arguments.dry else 32)
    settings = {"engines": 8, "probes": 16, "compensation": compressor.Compensation(images=64, positions=8)}  # fits the lease
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = compressor.compress(
            graph, (torch.zeros(1, 3, size, size),), calibrate=images.split(32),
            budget=compressor.Budget(latency=0.8 if arguments.dry else 0.5), target=target, method=compressor.CaP(**settings),
            out=Path(folder) / "run", progress=Said(),
        )  # fmt: skip
        row = {"network": name, "method": "CaP(engines=8, probes=16)", "seconds": time.monotonic() - begun}
        row |= {"latency_ratio": result.latency_ratio, "error": result.error, "met": result.met}
        row |= {"macs_share": result.steps[-1].macs / result.steps[0].macs, "widths": dict(result.widths)}
        yield {**row, "agreement": [[step.name, step.metric] for step in result.steps]}
        for seed in (1, 2, 3):  # engines built anew: also what the original's medians differ by
            found = measure({"original": graph, "compressed": result.graph}, target, seed, protocol(arguments))
            ratio = found["compressed"].ratio_to(found["original"])
            yield {
                "network": name,
                "original_ms": found["original"].median_ms,
                "compressed_ms": found["compressed"].median_ms,
                "ratio": ratio,
            }


def fine_tune(arguments):
    """ResNet-56 at half its MACs by `compress`, trained for the seconds that are left; accuracy on the test images."""
    import torch
    from cifar_resnet import resnet56
    from safetensors.torch import load_file

    import compressor
    from compressor.data.images import load_data
    from compressor.passes.tracing.trace import quiet_deepcopy
    from compressor.training.fine_tune import train

    if arguments.data is None or not (arguments.data / "cifar10.tar.xz").exists():
        raise Skip("no --data FOLDER with cifar10.tar.xz and resnet56.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(arguments.data / "cifar10.tar.xz") as packed:
            packed.extractall(folder, filter="data")
        data = load_data(f"cifar10:{folder}", limit=300 if arguments.dry else None)
        model = resnet56()
        model.load_state_dict(load_file(arguments.data / "resnet56.safetensors"))
        model = model.eval() if arguments.dry else model.eval().cuda()
        test = data.test.part(torch.arange(200)) if arguments.dry else data.test
        begun = time.monotonic()
        train(quiet_deepcopy(model), data.train, compressor.FineTune(epochs=1), teacher=model)
        epoch_s = time.monotonic() - begun
        epochs = 1 if arguments.dry else max(min(int((left_s(arguments) - 35) / epoch_s), 30), 1)
        few = {"probes": 16, "compensation": compressor.Compensation(images=64, positions=8)} if arguments.dry else {}
        result = compressor.compress(
            model, (torch.zeros(1, 3, 32, 32),), train=data.train, validate=data.validate, calibrate=data.plain, test=test,
            budget=compressor.Budget(macs=0.5), target=target_of(arguments, 8), method=compressor.CaP(**few),
            finetune=compressor.FineTune(epochs=epochs), out=Path(folder) / "run", progress=Said(),
        )  # fmt: skip
        yield {
            "network": "resnet56", "epochs": epochs, "epoch_s": epoch_s, "seconds": time.monotonic() - begun,
            "images": len(data.train.labels), "steps": [[s.name, s.metric] for s in result.steps], "test": result.test,
            "latency_ratio": result.latency_ratio, "macs_share": result.steps[-1].macs / result.steps[0].macs,
        }  # fmt: skip


def staircase(arguments):
    """Right edges of one early and one late group at FP16."""
    import compressor
    from compressor.runtime.latency_model.staircase import measure_staircase

    for name, graph in networks(arguments):
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

    from compressor.runtime.measuring.store import MeasurementStore
    from compressor.values.progress import Progress

    for name in ("resnet20",) if arguments.dry else NETWORKS:
        size, counts = (32, (8, 2)) if arguments.dry else (32 if name == "resnet56" else 224, (16, 10))
        target = target_of(arguments, 8)
        store = MeasurementStore(arguments.out / "cache" / "latency.sqlite")
        found, lines = bench_latency_model.run(name, size, target, *counts, store, Progress())
        if not arguments.dry:
            path = arguments.out / f"latency-model-{name}-torch-cudagraph-fp16.json"
            path.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        yield found


def compensation(arguments):
    """Compensation on the GPU against the same on the CPU: outputs, time, memory."""
    import torch

    import compressor
    from compressor.passes.fitting.compensate import Compensate
    from compressor.passes.fitting.settings import Compensation
    from compressor.passes.statistics.calibration import Calibration
    from compressor.passes.tracing.trace import quiet_deepcopy

    name, graph = next(networks(arguments))
    size = graph.meta["compressor.inputs"][0][0][-1]
    images = torch.randn(16 if arguments.dry else 64, 3, size, size, generator=torch.Generator().manual_seed(0))
    outputs, row = {}, {"network": name, "images": len(images)}
    for device in dict.fromkeys(("cpu", "cuda" if torch.cuda.is_available() else "cpu")):
        network = quiet_deepcopy(graph).to(device)
        channels = compressor.analyze(network)
        plan = channels.plan(0.5)
        small = compressor.apply(plan, network)
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
    from compressor.passes.statistics.calibration import Calibration
    from compressor.passes.tracing.trace import quiet_deepcopy
    from compressor.search.fitness import Fitness, Judge

    name, graph = next(networks(arguments))
    size = graph.meta["compressor.inputs"][0][0][-1]
    images = torch.randn(16 if arguments.dry else 256, 3, size, size, generator=torch.Generator().manual_seed(0))
    row = {"network": name, "images": len(images)}
    for device in dict.fromkeys(("cpu", "cuda" if torch.cuda.is_available() else "cpu")):
        network = quiet_deepcopy(graph).to(device)
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
    from compressor.passes.layers.factorizable import factorizable, sizes_of
    from compressor.passes.layers.forms import FORMS
    from compressor.passes.layers.rank_choice import by_rate
    from compressor.runtime.latency_model.single_layers import choices

    for name, graph in networks(arguments):
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
