"""The latency model against engines it never saw: error, rank correlation, speed; on ResNet-56, ResNet-50, MobileNetV2.

    python tools/bench_latency_model.py [--network resnet56] [--target onnxruntime] [--engines 40] [--structures 60]

Weights are random: a latency depends on shapes. Every engine is kept in the measurement store, so that it can be
killed and goes on. Writes tools/results/latency-model-<network>-<target>.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torchvision_ops
from cifar_resnet import resnet20, resnet56
from scipy.stats import spearmanr

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.methods.structures.legal_widths import widths
from compressor.runtime.backends import BACKENDS
from compressor.runtime.latency_model.training_engines import observe, spread, train_latency_model
from compressor.runtime.measuring.store import MeasurementStore
from compressor.runtime.timing.protocol import Protocol
from compressor.values.target import option_of

RESULTS = Path(__file__).parent / "results"


def network(name, size):
    torchvision_ops.declare()
    import torchvision

    builders = {
        "resnet20": resnet20,
        "resnet56": resnet56,
        "resnet50": torchvision.models.resnet50,
        "mobilenet_v2": torchvision.models.mobilenet_v2,
    }
    model = builders[name]().eval()
    for module in model.modules():  # statistics as of a trained network: norms that do nothing would be folded away
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return compressor.trace(model, (torch.randn(1, 3, size, size),))


def run(name, size, target, engines, count, store, progress):
    torch.manual_seed(0)
    channels = compressor.analyze(network(name, size))
    options = [widths(group, target.align) for group in channels.groups]
    protocol = Protocol(max_s=8.0)
    progress.stage(f"{name}: {engines} engines for the model")
    begun = time.monotonic()
    model = train_latency_model(channels, options, target, engines, 0, protocol, store, progress)
    trained = time.monotonic() - begun
    progress.stage(f"{name}: {count} engines that it has not seen")
    rows = spread(options, count + 2, seed=1)[2:]
    names = [group.name for group in channels.groups]
    structures = [compressor.Structure(tuple(zip(names, row.tolist(), strict=True))) for row in rows]
    seen = list(observe(channels, structures, target, protocol, store, progress, model.reference_ms))
    measured = np.array([o.median_ms for o in seen])
    predicted = np.array([model(o.structure) for o in seen])
    many = spread(options, 10_000, seed=2)
    begun = time.monotonic()
    model.predict(many)
    speed = time.monotonic() - begun
    off = np.abs(predicted / measured - 1)
    found = {
        "network": name, "target": target.fingerprint(), "input": size, "engines": engines, "structures": len(seen),
        "median_error": float(np.median(off)), "p90_error": float(np.percentile(off, 90)),
        "spearman": float(spearmanr(measured, predicted).statistic), "own_estimate": [model.error.median, model.error.p90],
        "seconds_for_10000": speed, "training_s": trained,
    }  # fmt: skip
    lines = [
        {
            "network": name,
            "target": target.backend,
            "structure": dict(o.structure.widths),
            "measured_ms": o.median_ms,
            "predicted_ms": p,
        }
        for o, p in zip(seen, predicted.tolist(), strict=True)
    ]
    return found, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=["resnet56", "resnet50", "mobilenet_v2"])
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--option", action="append", default=[], help="name=value of the back end, such as mode=cudagraph")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--engines", type=int, default=40)
    parser.add_argument("--structures", type=int, default=60)
    parser.add_argument("--size", type=int, default=224, help="of the ImageNet networks' inputs")
    parser.add_argument("--store", type=Path, default=None)
    arguments = parser.parse_args()
    options = dict(option_of(text, BACKENDS[arguments.target]().options) for text in arguments.option)
    target = compressor.Target(arguments.target, precision=arguments.precision, options=options)
    store = MeasurementStore(arguments.store)
    with ConsoleProgress() as progress:
        for name in arguments.network or ["resnet56", "mobilenet_v2", "resnet50"]:
            size = 32 if name == "resnet56" else arguments.size
            found, rows = run(name, size, target, arguments.engines, arguments.structures, store, progress)
            path = (
                RESULTS
                / f"latency-model-{name}-{target.backend}{'' if target.precision == 'fp32' else '-' + target.precision}.json"
            )
            path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            summary = RESULTS / "latency-model-summary.json"
            earlier = json.loads(summary.read_text()) if summary.exists() else []
            key = (name, target.backend, target.precision)
            kept = [e for e in earlier if (e["network"], e["target"]["backend"], e["target"]["precision"]) != key]
            summary.write_text(json.dumps([*kept, found], indent=1) + "\n")
            print(
                f"{name:14s} median error {100 * found['median_error']:.1f} %  p90 {100 * found['p90_error']:.1f} %  "
                f"Spearman {found['spearman']:.4f}  (own estimate {100 * found['own_estimate'][0]:.1f} / "
                f"{100 * found['own_estimate'][1]:.1f} %)  10,000 structures in {found['seconds_for_10000']:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
