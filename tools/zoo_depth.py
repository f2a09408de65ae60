"""Branches of the networks that people use: found, removed at random together with channels, verified, exported.

    python tools/zoo_depth.py                 # the short list of the zoo, and a few more
    python tools/zoo_depth.py --only regnet

For each model, with random weights: how many branches there are and what share of the MACs they hold; then random halves of them,
with random plans of 30 % of the channels: removed = masked, parameters and MACs as computed; and for the last of these the ONNX
export against PyTorch in ONNX Runtime. Prints a table and writes `tools/results/zoo-depth.json`.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402 - the clone's root has just been put on the path
import torch  # noqa: E402
from zoo_build import build  # noqa: E402

import compressor  # noqa: E402
from compressor.passes.transforms.verify import verify_removal  # noqa: E402
from compressor.runtime.measuring.measure import export_checked  # noqa: E402
from compressor.values.plan import Plan  # noqa: E402

MORE = r" (resnet50|efficientnet_b0|convnext_tiny|regnet_y_400mf|regnet_x_400mf|densenet121|vit_b_32|swin_t|vgg11_bn)$"
DRAWS = 3


def listed() -> list[tuple[str, ...]]:
    folder = Path(__file__).parent
    short = (folder / "zoo_short.txt").read_text().splitlines()
    models = [line for line in (folder / "zoo_models.txt").read_text().splitlines() if re.search(MORE, line)]
    return [tuple(line.split()) for line in dict.fromkeys([*short, *models]) if line and not line.startswith("#")]


def examined(entry: tuple[str, ...]) -> dict[str, object]:
    """The row of one model."""
    model, inputs = build(*entry)
    graph = compressor.trace(model.eval(), inputs).eval()
    channels = compressor.analyze(graph)
    whole = channels.costs_of(channels.full)
    random = np.random.default_rng(0)
    row: dict[str, object] = {"library": entry[0], "name": entry[3], "branches": len(channels.branches)}
    if not channels.branches:
        return {**row, "status": "none"}
    outer = {branch.at: branch.name for branch in channels.branches}  # one of each addition
    least = channels.costs_of(channels.structure(Plan.keep({}, removed=outer.values())))
    row["macs_in_branches"] = round(1 - float(least.macs[0] / whole.macs[0]), 3)
    worst = 0.0
    for seed in range(DRAWS):
        removed = [name for name in outer.values() if random.random() < 0.5] or list(outer.values())[:1]
        plan = Plan.keep(dict(channels.plan(0.3, seed=seed).kept), channels.digest, removed=removed)
        small = compressor.apply(plan, graph).eval()
        worst = max(worst, verify_removal(channels, plan, small).relative_error)
        costs, again = channels.costs_of(channels.structure(plan)), compressor.analyze(small)
        if costs.params[0] != sum(p.numel() for p in small.parameters()) or costs.macs[0] != again.costs_of(again.full).macs[0]:
            return {**row, "status": "wrong costs"}
    with tempfile.TemporaryDirectory() as folder:
        row["onnx_relative_error"] = float(f"{export_checked(small, Path(folder) / 'model.onnx'):.1e}")
    return {**row, "removed_masked_error": float(f"{worst:.1e}"), "removed": len(removed), "status": "ok"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the name")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for entry in listed():
        if not re.search(args.only, entry[3]):
            continue
        begun = time.monotonic()
        try:
            row = examined(entry)
        except Exception as error:  # a row says what went wrong, the others go on
            row = {"library": entry[0], "name": entry[3], "status": f"{type(error).__name__}: {str(error)[:160]}"}
        row["seconds"] = round(time.monotonic() - begun, 1)
        rows.append(row)
        share, found = row.get("macs_in_branches", ""), row.get("removed_masked_error", "")
        print(f"{row['name']!s:36s} {row.get('branches', '')!s:>4s} {share!s:>6s} {found!s:>8s} {row['status']}", flush=True)
    good = sum(row["status"] in ("ok", "none") for row in rows)
    print(f"{len(rows)} models, {good} as they should be, {sum(row.get('branches', 0) for row in rows)} branches")
    if not args.only:
        (args.results / "zoo-depth.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
