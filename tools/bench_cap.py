"""What compensation brings, option by option: accuracy without a single gradient step.

    python tools/bench_cap.py --network resnet56 --data DIR --weights resnet56_cifar10.safetensors
    python tools/bench_cap.py --network mobilenetv2 --model networks.py:FUNCTION --images DIR --test DIR

CIFAR-10: DIR is the official binary version; statistics come from training images, every decision from a hold-out of
them, and `top1` is that of the 10,000 test images, looked at once per row. Another network: FUNCTION returns it without
arguments, `--images` is a folder of images for statistics (no labels), `--test` one folder per class whose name begins
with the number of the class (`--offset` is added to it); `--mean` and `--std` normalise.

Each row adds one option to the row before; `norms` says whether batch norms were recalibrated afterwards. Rows without
`cap` in their method are the plain criteria. Prints a table and writes `tools/results/cap-NETWORK.json`.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cifar_resnet

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.data.images import Images, load_data, load_images
from compressor.data.user_models import load_callable
from compressor.methods import CaP, Magnitude, Problem
from compressor.methods.losses.allocation import POWERS, Allocation, Weighting
from compressor.methods.magnitude import path_by_scores
from compressor.methods.published.cap import PublishedCaP
from compressor.methods.structures.paths import Widths, fitting
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.losses import loss_curves
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.training.evaluate import evaluate, recalibrate
from compressor.values.files import load_weights, write_bytes

PUBLISHED = Compensation.published()
OWN = Compensation()
FIXED = replace(OWN, ridge=1e-6)
LADDER = (  # (name, widths, weights, compensation): each adds one thing
    ("uniform widths, as published", "uniform", "plain", PUBLISHED),
    ("variances not rescaled", "uniform", "plain", replace(PUBLISHED, rescale=False)),
    ("widths by loss curves", "curves", "plain", replace(PUBLISHED, rescale=False)),
    ("all layers refitted", "curves", "plain", FIXED),
    ("weights by sensitivity", "curves", "sensitivity", FIXED),
    ("best of three weightings", "curves", "best", FIXED),
    ("ridge by held-out error", "curves", "best", OWN),
)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, []
        if args.model:
            model = load_callable(args.model)()
            mean, std = (tuple(float(v) for v in text.split(",")) for text in (args.mean, args.std))
            self.images = load_images(args.images, 50, mean, std)
            self.test = by_index(Path(args.test), args.offset, mean, std)
            self.holdout = self.images
        else:
            model = getattr(cifar_resnet, args.network)()
            load_weights(model, Path(args.weights))
            data = load_data(f"cifar10:{args.data}", 250)
            self.images, self.test, self.holdout = data.plain, data.test, data.validate
        shape = (1, *self.images.images.shape[1:])
        self.example = (torch.zeros(shape),)
        self.graph = compressor.trace(model.eval(), self.example)
        self.channels = compressor.analyze(self.graph)
        self.calibration = Calibration.read(self.images, self.graph, args.calibrate)
        self.full = float(self.channels.costs(self.channels.widths([self.channels.full])).macs[0])
        self.add("original", {}, None, self.graph, 0.0)

    def problem(self, ratio: float) -> Problem:
        target = compressor.Target(align=self.args.align)
        limits = {"macs": ratio * self.full}
        return Problem(self.channels, limits, target, _refuse, None, 0, self.holdout, self.calibration)

    def add(self, method: str, options: dict, ratio: float | None, graph, seconds: float) -> None:
        found = evaluate(graph, self.test).value
        row = {
            "network": self.args.network, "method": method, "options": options, "macs_ratio": round(ratio or 1.0, 4),
            "top1": round(found, 2), "images": self.calibration.images, "seconds": round(seconds, 1),
        }  # fmt: skip
        self.rows.append(row)
        print(line(row), flush=True)
        self.write()

    def write(self) -> None:
        path = self.args.results / f"cap-{self.args.network}.json"
        write_bytes(path, as_json(merged(path, self.rows) if partial(self.args) else self.rows))

    def narrowed(self, plan):
        graph = compressor.apply(plan, self.graph).eval()
        ratio = float(self.channels.costs(self.channels.widths([self.channels.structure(plan)])).macs[0]) / self.full
        return graph, ratio

    def recalibrated(self, graph) -> float:
        begun = time.monotonic()
        recalibrate(graph, [(batch[0], batch[0]) for batch in self.calibration.batches], limit=10_000)
        return time.monotonic() - begun

    def plain(self, ratio: float) -> None:
        for criterion, scope in (
            ("l1", "uniform"),
            ("l1", "global"),
            ("geometric-median", "uniform"),
            ("geometric-median", "global"),
        ):
            begun = time.monotonic()
            graph, found = self.narrowed(Magnitude(criterion, scope).plan(self.problem(ratio)))
            self.recalibrated(graph)
            norms = "recalibrated" if has_norms(graph) else "none"
            self.add(f"{criterion} {scope}", {"norms": norms}, found, graph, time.monotonic() - begun)

    def ladder(self, ratio: float, curves, spent: float) -> None:
        spare = min(256, self.calibration.images // 4)
        used, spared = self.calibration.after(spare), self.calibration.first(spare)
        for name, widths, weights, compensation in LADDER:
            if not any(text in name for text in self.args.only.split(",")):
                continue
            begun = time.monotonic()
            problem = self.problem(ratio)
            if widths == "uniform":
                scores = {group: curve.ranking.scores for group, curve in curves.items()}
                for group in self.channels.free:
                    scores.setdefault(group.name, torch.arange(group.size, 0, -1).double().numpy())
                plan = fitting(Widths(problem, scores), path_by_scores(problem, scores, "uniform"))
            else:
                allocation, method = Allocation(problem, curves, None), CaP(compensation=compensation)
                order = [Weighting(weights)] if weights in POWERS else method.order(problem, allocation, used, spared)
                plan = method.decided(problem, allocation, order)
            graph, found = self.narrowed(plan)
            graph = Compensate(self.channels, plan, self.calibration, replace(compensation, images=10**9))(graph).graph
            seconds = spent + time.monotonic() - begun
            options = {"option": name, "widths": widths, "weights": weights, **compensation.to_dict()}
            del options["images"]
            self.add("cap", {**options, "norms": "left" if has_norms(graph) else "none"}, found, graph, seconds)
            if has_norms(graph):
                more = self.recalibrated(graph)
                self.add("cap", {**options, "norms": "recalibrated"}, found, graph, seconds + more)

    def latency(self, ratio: float) -> None:
        """A budget in measured latency, as a user asks for it: nothing is trained."""
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, ConsoleProgress() as progress:
            result = compressor.compress(
                self.graph, self.example, validate=self.holdout, calibrate=self.images, test=self.test,
                budget=compressor.Budget(latency=ratio), target=compressor.Target(align=self.args.align),
                method=CaP(compensation=replace(OWN, images=self.args.calibrate)),
                finetune=compressor.FineTune(epochs=0), out=Path(folder) / "run", progress=progress,
            )  # fmt: skip
        macs = float(self.channels.costs_of(self.channels.structure(result.plan)).macs[0]) / self.full
        options = {"option": f"latency {ratio:g}", "norms": "left"}
        self.add("cap", options, macs, result.graph, time.monotonic() - begun)
        target = {name: str(value) for name, value in result.compressed.target.items()}
        self.rows[-1].update(latency_ratio=round(result.latency_ratio, 4), target=target)
        self.write()

    def whole(self, ratio: float, method: CaP | PublishedCaP, name: str) -> None:
        """A method as a user calls it, from nothing."""
        begun = time.monotonic()
        problem = self.problem(ratio)
        if method.floor is not None:
            problem = replace(problem, limits={})
        with ConsoleProgress() as progress:
            plan = method.plan(replace(problem, progress=progress))
        graph, found = self.narrowed(plan)
        graph = Compensate(self.channels, plan, self.calibration, method.compensation)(graph).graph
        seconds = time.monotonic() - begun
        options = {"option": name, "floor": method.floor}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.add("cap", {**options, "norms": "left", "peak_memory_gb": round(peak, 2)}, found, graph, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("--floors", default="", help="also: networks of these lowest accuracies, such as 0.9")
    parser.add_argument("--latencies", default="", help="also: budgets in measured latency, shares of the original's")
    parser.add_argument(
        "--whole", action="store_true", help="only the methods as a user calls them, from nothing, with peak memory"
    )
    parser.add_argument(
        "--only", default="", help="parts of the names of the rows wanted, joined by commas; others stay as they are"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bench = Bench(args)
    ratios = [float(text) for text in args.ratios.split(",")]
    if args.whole:
        for ratio in ratios:
            bench.whole(ratio, CaP(), "whole run")
    elif args.only or not (args.floors or args.latencies):
        begun = time.monotonic()
        curves = loss_curves(bench.channels, bench.calibration, OWN)
        spent = time.monotonic() - begun
        for ratio in ratios:
            if not args.only or "plain" in args.only:
                bench.plain(ratio)
            bench.ladder(ratio, curves, spent)
    for text in filter(None, args.floors.split(",")):
        floor = float(text)
        bench.whole(1.0, CaP.published(floor), f"published search, floor {floor}")
        bench.whole(1.0, CaP(floor=floor), f"walk to the floor {floor}")
    for text in filter(None, args.latencies.split(",")):
        bench.latency(float(text))
    print(table(bench.rows))


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network, on which data."""
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--data", help="folder of the official binary version of CIFAR-10")
    parser.add_argument("--weights", help=".safetensors of resnet56 or resnet20")
    parser.add_argument("--model", help="another network: file.py:callable")
    parser.add_argument("--images", help="its images for statistics")
    parser.add_argument("--test", help="its test images, one folder per class")
    parser.add_argument("--offset", type=int, default=0, help="of the network's outputs to the numbers of these folders")
    parser.add_argument("--mean", default="0.485,0.456,0.406")
    parser.add_argument("--std", default="0.229,0.224,0.225")
    parser.add_argument("--ratios", default="0.7,0.5,0.35", help="shares of the MACs that stay")
    parser.add_argument("--calibrate", type=int, default=2000, help="images for statistics")
    parser.add_argument("--align", type=int, default=1)


def has_norms(graph) -> bool:
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in graph.modules())


def partial(args: argparse.Namespace) -> bool:
    """Whether only some of the rows are made, so that the others stay."""
    return bool(args.only or args.whole or args.floors or args.latencies)


def by_index(folder: Path, offset: int, mean, std) -> Images:
    parts = [
        (int(path.name.split("_")[0]) + offset, load_images(str(path), 50, mean, std))
        for path in sorted(folder.iterdir())
        if path.is_dir()
    ]
    images = torch.cat([own.images for _, own in parts])
    labels = torch.cat([torch.full((len(own.images),), label) for label, own in parts])
    return replace(parts[0][1], images=images, labels=labels)


def _refuse(plan):
    raise AssertionError("a budget in MACs measures nothing")


def line(row: dict) -> str:
    options = row["options"]
    name = f"{row['method']}: {options['option']}" if "option" in options else row["method"]
    numbers = f"{row['macs_ratio']:.3f} | {row['top1']:.2f} | {row['images']} | {row['seconds']:.0f} s"
    return f"| {name} | {options.get('norms', '')} | {numbers} |"


def table(rows: list[dict]) -> str:
    return "\n".join(["| method | norms | MACs | top-1 % | images | time |", "|" + "---|" * 6, *map(line, rows)])


def merged(path: Path, rows: list[dict]) -> list[dict]:
    """The rows of an earlier run, but for those that were made anew."""
    new = {key_of(row) for row in rows}
    return [*[row for row in json.loads(path.read_text()) if key_of(row) not in new], *rows] if path.exists() else rows


def key_of(row: dict) -> tuple:
    return row["method"], row["options"].get("option"), row["options"].get("norms"), round(row["macs_ratio"], 2)


def as_json(rows: list[dict]) -> bytes:
    return (json.dumps(rows, indent=1) + "\n").encode()


if __name__ == "__main__":
    main()
