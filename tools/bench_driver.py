"""Latency, not FLOPs: the same losses spent by milliseconds and by MACs, down to the same measured latency.

    python tools/bench_driver.py --data DIR --weights resnet56_cifar10.safetensors --latency 0.5
    python tools/bench_driver.py --network mobilenetv2 --model FILE.py:CALLABLE --images FOLDER --test FOLDER --offset 1 \
        --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --calibrate 1000 --latency 0.7
    python tools/bench_driver.py --network resnet50 --latency 0.5

Both walk down CaP's loss curves, of channels or of ranks or of both (`--space`), notch after notch where it costs the least loss
for what it saves; what it saves is counted in MACs or in the milliseconds of a latency model, and both stop where the built
network is measured to meet the budget. `top1` is
that of the compensated network on the test images, nothing trained. torchvision's ResNet-50 has random weights: there a filter's
loss is its squared norm, and the share of that which is lost stands for the accuracy.

Rows in `tools/results/driver-NETWORK.json`; curves and plans are kept in `--work`.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_cap
import bench_cc
import benching

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.methods import CaP, Problem
from compressor.methods.losses.allocation import Allocation, Weighting
from compressor.methods.losses.curves import curves_of
from compressor.methods.structures.legal_widths import widths
from compressor.passes.criteria import CRITERIA, Scoring
from compressor.passes.fitting.compensated_ranking import Ranking
from compressor.passes.fitting.losses import Curve
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.runtime.latency_model.training_engines import train_latency_model
from compressor.runtime.measuring.measure import Comparison
from compressor.training.evaluate import evaluate
from compressor.values.files import read_json, write_bytes, write_json
from compressor.values.plan import Plan

SPARED = 256


class Trained(bench_cc.Bench):
    """A network with its images."""

    def problem(self, ratio: float, comparison: Comparison) -> Problem:
        """To a latency."""
        return Problem(
            self.channels, {"latency": ratio}, self.target, partial(benching.measured_in, comparison, self.channels), None, 0,
            calibration=self.calibration, progress=ConsoleProgress(), once=self.once,
        )  # fmt: skip

    def curves(self, problem: Problem) -> dict[str, Curve]:
        """What channels lose."""
        self.spent = self.made = 0.0
        groups = self.args.space != "ranks"
        return curves_of(problem, self.calibration.after(SPARED), Compensation(), SPARED, groups)

    def worth(self, plan: Plan) -> dict[str, float]:
        """Accuracy after compensation."""
        graph = benching.repaired(self.channels, plan, self.calibration, Compensation(images=self.args.calibrate))
        return {"top1": round(evaluate(benching.channels_last(graph), self.test).value, 2)}


class Untrained(Trained):
    """torchvision's ResNet-50."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torchvision_ops

        torchvision_ops.declare()
        import torchvision

        torch.manual_seed(0)
        self.args = args
        example = (torch.zeros(1, 3, 224, 224),)
        self.graph = compressor.trace(torchvision.models.resnet50().eval(), example)
        self.channels = compressor.analyze(self.graph)
        self.calibration = Calibration.read([(torch.randn(8, 3, 224, 224),)], self.graph, 8)
        self.target = compressor.Target(align=args.align)
        self.full = self.costs(self.channels.full)

    def curves(self, problem: Problem) -> dict[str, Curve]:
        """Squared norms, the smallest first, as shares of the group's."""
        scoring, found = Scoring(self.channels), {}
        for group in self.channels.free:
            squares = CRITERIA["l2"](aggregate="sum")(scoring, group) ** 2
            order = np.argsort(-squares, kind="stable")
            left = squares.sum() - np.concatenate([[0.0], np.cumsum(squares[order])])
            found[group.name] = Curve(Ranking(order, left.clip(0) / squares.sum()))
        self._curves = found
        return found

    def worth(self, plan: Plan) -> dict[str, float]:
        """The mean share of a group that is lost."""
        width = {name: len(kept) for name, kept in plan.kept}
        lost = [curve.ranking.loss[width.get(name, -1)] for name, curve in self._curves.items()]
        return {"norm_lost": round(float(np.mean(lost)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_cap.add_network_arguments(parser)
    parser.add_argument("--latency", type=float, default=0.5, help="share of the original's that both go down to")
    parser.add_argument("--space", default="channels", choices=("channels", "ranks", "channels+ranks"), help="what is reduced")
    parser.add_argument("--engines", type=int, default=24, help="that the latency model is fitted to")
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_driver"), help="curves and plans")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bench = Untrained(args) if args.network == "resnet50" else Trained(args)
    file = args.results / f"driver-{args.network}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    asked = (args.latency, args.space, args.align)
    rows = [row for row in rows if tuple(row["options"][name] for name in ("asked", "space", "align")) != asked]
    graphs = {"original": bench.graph}
    found = []
    with Comparison(bench.graph, bench.target, 0) as comparison:
        problem = bench.problem(args.latency, comparison)
        problem = problem if args.space == "channels" else problem.over(ranks=True)
        curves = bench.curves(problem)
        legal = [widths(group, args.align) for group in problem.channels.groups]
        begun = time.monotonic()
        model = train_latency_model(problem.channels, legal, bench.target, args.engines, progress=problem.progress)
        print(f"latency model: {time.monotonic() - begun:.0f} s", flush=True)
        used, spared = bench.calibration.after(SPARED), bench.calibration.first(SPARED)
        method = CaP(space=args.space)
        for driver in ("macs", "latency"):
            name = f"{args.network}-{args.latency:g}-{args.space}-{args.align}-{driver}"
            kept, clock = args.work / f"{name}.json", args.work / f"{name}-seconds.json"
            if not clock.exists():  # else a run that was killed had decided
                begun = time.monotonic()
                allocation = Allocation(problem, curves, model if driver == "latency" else None)
                random = args.network == "resnet50"  # weights: there is nothing that outputs could be near to
                order = [Weighting("plain")] if random else method.order(problem, allocation, used, spared)
                plan = method.decided(problem, allocation, order)
                args.work.mkdir(parents=True, exist_ok=True)
                write_bytes(kept, plan.to_json().encode())
                write_json(clock, {"seconds": time.monotonic() - begun})
            plan, seconds = Plan.load(kept), read_json(clock)["seconds"]
            graphs[driver] = compressor.apply(plan, bench.graph).eval()
            row = {
                "network": args.network, "method": method.name, "driver": driver,
                "options": {"asked": args.latency, "space": args.space, "align": args.align, "engines": args.engines},
                "macs_ratio": round(bench.costs(bench.channels.structure(plan))[0] / bench.full[0], 4),
                **bench.worth(plan), "seconds": round(seconds, 1),
            }  # fmt: skip
            found.append(row)
            print(row, flush=True)
    times = benching.timed_together(graphs, bench.target)
    for row in found:
        row.update(times[row["driver"]])
        worth = f"{row['top1']:.2f} %" if "top1" in row else f"{row['norm_lost']:.4f} of the squared norms lost"
        print(f"by {row['driver']}: {row['macs_ratio']:.3f} of the MACs, {row['latency_ratio']:.3f} of the latency, {worth}")
    write_bytes(file, (json.dumps([*rows, *found], indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
