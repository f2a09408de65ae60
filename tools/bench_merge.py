"""Two layers as one: which pairs can be merged exactly, what that saves in MACs, and whether it is faster.

    python tools/bench_merge.py
    python tools/bench_merge.py --only vgg

For each network, with random weights and shifts of its batch norms: the pairs with nothing but an activation between them,
those that become one layer exactly without it (`MergeLayers`), and of these the first few, those that save the most MACs first: the
network with this pair merged, timed beside the original in one session. Accepted is what is faster beyond the noise. Prints a table
and writes `tools/results/merge-onnxruntime.json`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402 - the clone's root has just been put on the path
import torchvision_ops  # noqa: E402

torchvision_ops.declare()
import torchvision.models as zoo  # noqa: E402
from torch import nn  # noqa: E402

import compressor  # noqa: E402
from compressor.passes.transforms.fold_batchnorm import FoldBatchNorm  # noqa: E402
from compressor.passes.transforms.merge_layers import MergeLayers, merges_of  # noqa: E402
from compressor.runtime.measuring.measure import measure  # noqa: E402
from compressor.values.measurement import contest  # noqa: E402


def network_in_network() -> nn.Module:
    """A plain chain: 3x3, then two 1x1, three times (Lin et al., 2014)."""
    parts: list[nn.Module] = []
    width = 3
    for outputs in (64, 128, 256):
        parts += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 1), nn.ReLU()]
        parts += [nn.Conv2d(outputs, outputs, 1), nn.ReLU(), nn.MaxPool2d(2)]
        width = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETWORKS = {
    "vgg11_bn": (lambda: zoo.vgg11_bn(weights=None, num_classes=10), 64),
    "network in network": (network_in_network, 32),
    "mobilenet_v2": (lambda: zoo.mobilenet_v2(weights=None), 224),
    "efficientnet_v2_s": (lambda: zoo.efficientnet_v2_s(weights=None), 128),
    "convnext_tiny": (lambda: zoo.convnext_tiny(weights=None), 128),
    "vit_b_32": (lambda: zoo.vit_b_32(weights=None), 224),
}


def rows_of(name: str, most: int) -> list[dict[str, object]]:
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as trained ones: a layer without a bias would be merged exactly for that alone
            nn.init.normal_(module.bias)
    graph = FoldBatchNorm()(compressor.trace(model, (torch.zeros(1, 3, size, size),))).graph
    merges = merges_of(graph)
    exact = [merge for merge in merges if not merge.reason]
    row: dict[str, object] = {"network": name, "pairs": len(merges), "exact": len(exact)}
    row["refused"] = {reason: sum(m.reason == reason for m in merges) for reason in sorted({m.reason for m in merges if m.reason})}
    rows = []
    for merge in sorted(exact, key=lambda merge: merge.macs[1] - merge.macs[0])[:most]:
        graphs = {"original": graph, "merged": MergeLayers([merge.second])(graph).graph}
        found = measure(graphs, compressor.Target(), 0)
        verdict = contest(found["merged"], found["original"], float(str(found["merged"].details["noise_floor"])))
        rows.append({
            **row, "layers": [merge.first, merge.second], "macs": list(merge.macs), "latency_ratio": round(verdict.ratio, 4),
            "interval": [round(edge, 4) for edge in verdict.interval], "accepted": verdict.winner < 0,
            "target": {key: str(value) for key, value in found["merged"].target.items()},
        })  # fmt: skip
    return rows or [row]


def line(row: dict) -> str:
    start = f"{row['network']:20s} {row['pairs']:3d} pairs, {row['exact']:3d} exact"
    if "layers" not in row:
        return f"{start}; refused: {row['refused']}"
    before, after = row["macs"]
    low, high = row["interval"]
    word = "accepted" if row["accepted"] else "left alone"
    layers = " + ".join(row["layers"])
    return f"{start}  {layers:60s} MACs x {after / before:.2f}, latency x {row['latency_ratio']:.3f} [{low:.3f}, {high:.3f}] {word}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the name")
    parser.add_argument("--most", type=int, default=3, help="pairs of a network that are timed")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    for name in NETWORKS:
        if re.search(args.only, name):
            rows += rows_of(name, args.most)
            print("\n".join(line(row) for row in rows if row["network"] == name), flush=True)
    if not args.only:
        (args.results / "merge-onnxruntime.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
