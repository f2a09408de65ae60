"""ONNX for candidates of a search: written from a template against `torch.onnx.export`, in the same run.

    python tools/bench_lowering.py [--candidates 5]

Every model is compared with PyTorch in ONNX Runtime. Writes tools/results/lowering.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torchvision_ops
from bench_latency_model import network

import compressor
from compressor.methods.structures.legal_widths import widths
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.runtime.latency_model.training_engines import plan_of, spread
from compressor.runtime.measuring.measure import check_onnx
from compressor.runtime.onnx.export import to_onnx
from compressor.runtime.onnx.templates import Lowering
from compressor.values.plan import Structure

RESULTS = Path(__file__).parent / "results" / "lowering.json"
NETWORKS = {"resnet56": 32, "mobilenet_v2": 64, "resnet50": 64}


def seconds(call):
    begun = time.perf_counter()
    return call(), time.perf_counter() - begun


def run(name, size, count):
    graph = network(name, size)
    channels = compressor.analyze(graph)
    rows = spread([widths(group, 8) for group in channels.groups], count + 4, seed=0)[2:]
    names = [group.name for group in channels.groups]
    example = (torch.randn(2, 3, size, size),)
    lower, written, exported, worst = Lowering(), [], [], 0.0
    for row in rows:
        plan = plan_of(channels, Structure(tuple(zip(names, row.tolist(), strict=True))))
        small = RemoveChannels(plan, channels)(graph).graph
        before = lower.written
        model, taken = seconds(lambda s=small: lower(s, example))
        worst = max(worst, check_onnx(model.SerializeToString(), small))
        if lower.written > before:
            written.append(taken)
            exported.append(seconds(lambda s=small: to_onnx(s, example))[1])
    return {
        "network": name, "candidates": len(rows), "exports": lower.exports,
        "written_s": statistics.median(written), "exported_s": statistics.median(exported),
        "ratio": statistics.median(np.array(exported) / np.array(written)), "largest_error": worst,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=5)
    arguments = parser.parse_args()
    torchvision_ops.declare()
    rows = [run(name, size, arguments.candidates) for name, size in NETWORKS.items()]
    for row in rows:
        print(
            f"{row['network']:14s} written {row['written_s']:.3f} s  exported {row['exported_s']:6.2f} s  "
            f"ratio {row['ratio']:5.0f}  {row['exports']} of {row['candidates']} exported  error {row['largest_error']:.1e}"
        )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
