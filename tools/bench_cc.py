"""CC, its halves and its options at equal MACs: accuracy before and after a short fine-tune, MACs, parameters, measured latency.

    python tools/bench_cc.py --data DIR --weights resnet56_cifar10.safetensors

DIR is the official binary version of CIFAR-10. Gradients are those of at most `--gradient-images` training images without
augmentation, statistics those of 2,000; batch norms are recalibrated in every row that is not compensated. `top1` is that of
the test images, before any training and after the same fine-tune; latency is measured, whole engines, original and
result in one session. `seconds` are those of the decision, the gradient pass and the scores among them.

    python tools/bench_cc.py --network mobilenetv2 --model FILE.py:CALLABLE --images FOLDER --test FOLDER --offset 1 \
        --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5

is another network on folders of images, one per class, named `NUMBER_...`. `--latencies 0.7 --ratios ""` asks for shares of
the original's measured latency instead of its MACs. `--scores` times CC's scores on torchvision's ResNet-50 with random
weights and synthetic gradients instead: `tools/results/cc-scores-resnet50.json`.

Killed, the same command goes on: scores and finished parts lie in `--work`, rows in `tools/results/cc-NETWORK.json`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_cap
import benching
import cifar_resnet

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.data.images import load_data, load_images, unaugmented
from compressor.data.user_models import load_callable
from compressor.errors import BudgetError
from compressor.methods import CC, Factorize, Problem
from compressor.methods.layers.cc_removal import Layer, removal_path
from compressor.methods.layers.unit_plans import UnitPlans
from compressor.methods.published import cc as published
from compressor.methods.published.cc import PublishedCC
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.product import take_state
from compressor.passes.statistics.calibration import Calibration
from compressor.runtime.measuring.measure import Comparison, measure
from compressor.training.evaluate import evaluate
from compressor.training.fine_tune import FineTune
from compressor.training.fine_tune import train as fine_tune
from compressor.training.gradients import squared_gradients
from compressor.values.files import load_tensors, load_weights, read_json, save_tensors, write_bytes, write_json
from compressor.values.plan import Plan, digest_of

Compared = CC | PublishedCC | Factorize


@dataclass(frozen=True)
class Row:
    """What is compared: a method, and how its network is repaired before any training."""

    method: Callable[[], Compared]
    compensation: Compensation | None = None


@dataclass(frozen=True)
class Goal:
    """What is asked for: a share of the original's `macs` or measured `latency`, widths that are multiples of `align`."""

    driver: str
    share: float
    align: int

    def __str__(self) -> str:
        """As files are named."""
        share = f"{self.share:g}" if self.driver == "macs" else f"{self.driver} {self.share:g}"
        return share if self.align == 1 else f"{share}, align {self.align}"


RATE = 0.003  # of a network without norms
PUBLISHED = CC.published()
CLOSED = Compensation()
ROWS = {
    "SVD only": Row(lambda: Factorize("svd", "energy", compensation=None)),
    "Tucker-2 only": Row(lambda: Factorize("tucker2", "energy", compensation=None)),
    "spatial SVD only": Row(lambda: Factorize("spatial_svd", "energy", compensation=None)),
    "CC as published": Row(lambda: PUBLISHED),
    "CC as published, compensated": Row(lambda: PUBLISHED, CLOSED),
    "SVD only, on real features": Row(lambda: Factorize("svd", "energy", compensation=None), Compensation("original")),
    "SVD only, compensated": Row(lambda: Factorize("svd", "energy", compensation=None), CLOSED),
    "features: channels only": Row(lambda: CC("channels"), CLOSED),
    "features: ranks only": Row(lambda: CC("ranks"), CLOSED),
    "features: CC as called": Row(CC, CLOSED),
    "spatial SVD only, compensated": Row(lambda: Factorize("spatial_svd", "energy", compensation=None), CLOSED),
}


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.model:
            model = load_callable(args.model)()
            mean, std = (tuple(float(v) for v in text.split(",")) for text in (args.mean, args.std))
            images = load_images(args.images, 50, mean, std)
            self.test = bench_cap.by_index(Path(args.test), args.offset, mean, std)
            shape = (1, *images.images.shape[1:])
        else:
            model = getattr(cifar_resnet, args.network)()
            load_weights(model, Path(args.weights))
            data = load_data(f"cifar10:{args.data}", 250)
            images, self.test, shape = data.plain, data.test, (1, 3, 32, 32)
        self.graph = compressor.trace(model.eval(), (torch.zeros(shape),))
        self.channels = compressor.analyze(self.graph)
        self.calibration = Calibration.read(images, self.graph, args.calibrate)
        if args.model:  # no labels: the original's own
            self.train = [(x, self.graph(x).argmax(1)) for (x,) in self.calibration.batches]
        else:
            self.train = load_data(f"cifar10:{args.data}", 128, args.train_images).train
        self.target = compressor.Target(align=args.align)
        self.full = self.costs(self.channels.full)
        self.results = args.results / f"cc-{args.network}.json"
        self.work = args.work / args.network
        self.work.mkdir(parents=True, exist_ok=True)

    def costs(self, structure) -> tuple[float, float]:
        found = self.channels.costs_of(structure)
        return float(found.macs[0]), float(found.params[0])

    def rows(self) -> list[dict]:
        return json.loads(self.results.read_text()) if self.results.exists() else []

    def once(self, name: str, work: Callable[[], dict]) -> dict:
        # scores depend on network and data alone: all rows share them
        file = self.work / ("".join(c if c.isalnum() else "-" for c in name) + ".json")
        if not file.exists():
            begun = time.monotonic()
            write_json(file, {**work(), "took_s": time.monotonic() - begun})
            self.made += time.monotonic() - begun
        found = read_json(file)
        self.spent += found["took_s"]
        return found

    def plan(self, method: Compared, goal: Goal) -> Plan:
        limits = {"macs": goal.share * self.full[0]} if goal.driver == "macs" else {"latency": goal.share}
        with Comparison(self.graph, self.target, 0) as comparison:
            problem = Problem(
                self.channels, limits, self.target, partial(benching.measured_in, comparison, self.channels),
                unaugmented(self.train), 0, calibration=self.calibration, progress=ConsoleProgress(), once=self.once,
            )  # fmt: skip
            return method.plan(problem)

    def run(self, name: str, row: Row, goal: Goal) -> None:
        if (name, goal, self.args.epochs) in {key_of(own) for own in self.rows()}:
            return
        print(f"\n== {name}, {goal.share:g} of the {goal.driver}", flush=True)
        method = row.method()
        try:
            plan, seconds = self.decided(name, method, goal)
        except BudgetError as error:
            print(f"   {error}", flush=True)
            return
        settings = row.compensation and replace(row.compensation, images=self.args.calibrate)
        graph = benching.repaired(self.channels, plan, self.calibration, settings)
        top1 = evaluate(benching.channels_last(graph), self.test).value
        print(f"   {top1:.2f} % before training", flush=True)
        tuned = self.tuned(graph, f"{name} {goal} {self.args.epochs}")
        found = measure({"original": self.graph, "compressed": graph}, self.target)
        macs, params = self.costs(self.channels.structure(plan))
        options = {
            **method.to_dict(), "compensation": row.compensation is not None, "driver": goal.driver, "asked": goal.share,
            "epochs": self.args.epochs, "align": self.args.align,
            "gathers_made": len(plan.reads), "layers_factorized": len(plan.factors), "gradient_images": self.args.gradient_images,
        }  # fmt: skip
        result = {
            "network": self.args.network, "method": name, "options": options, "macs_ratio": round(macs / self.full[0], 4),
            "params_ratio": round(params / self.full[1], 4),
            "latency_ratio": round(found["compressed"].ratio_to(found["original"]), 4),
            "target": {k: str(v) for k, v in found["original"].target.items()}, "top1": round(top1, 2),
            "top1_finetuned": round(evaluate(tuned, self.test).value, 2) if tuned else None, "seconds": round(seconds, 1),
        }  # fmt: skip
        print(line(result), flush=True)
        write_bytes(self.results, (json.dumps([*self.rows(), result], indent=1) + "\n").encode())

    def gradients(self, graph, batches, images: int, progress) -> dict[str, torch.Tensor]:
        """As CC computes them, kept for the rows that follow; the time they took counts in each."""
        file = self.work / f"squares-mean-{images}.safetensors"

        def work() -> dict:
            save_tensors(file, squared_gradients(graph, batches, images, progress))
            return {}

        self.once(file.stem, work)
        return load_tensors(file)

    def decided(self, name: str, method: Compared, goal: Goal) -> tuple[Plan, float]:
        """The plan, and how long it took to find, the shared scores among it."""
        file, clock = (self.file(f"{name} {goal}{end}", ".json") for end in ("", " seconds"))
        settings = [method.to_dict(), self.args.calibrate, self.args.gradient_images, self.args.align]
        known = read_json(clock) if clock.exists() else {}
        if known.get("digest") != digest_of(settings):
            self.spent, self.made, begun = 0.0, 0.0, time.monotonic()
            if isinstance(method, PublishedCC):
                method = replace(method, images=self.args.gradient_images)
            plan = self.plan(method, goal)
            write_bytes(file, plan.to_json().encode())
            known = {"seconds": time.monotonic() - begun + self.spent - self.made, "digest": digest_of(settings)}
            write_json(clock, known)
        return Plan.load(file), known["seconds"]

    def file(self, name: str, suffix: str) -> Path:
        return self.work / ("".join(c if c.isalnum() else "-" for c in name.lower()) + suffix)

    def remeasure(self) -> None:
        """Times the networks of all rows whose plans are left again, beside each other."""
        rows, graphs = self.rows(), {"original": self.graph}
        for row in rows:
            name, goal = row["method"], goal_of(row)
            file = self.file(f"{name} {goal}", ".json")
            if self.args.only and name not in self.args.only.split(";"):
                continue
            if not file.exists():
                print(f"no plan is left of {name} at {goal}")
                continue
            plan = Plan.load(file)
            macs, _ = self.costs(self.channels.structure(plan))
            if round(macs / self.full[0], 4) == row["macs_ratio"]:
                graphs[f"{name} {goal}"] = compressor.apply(plan, self.graph).eval()
            else:
                print(f"the plan left of {name} at {goal} has {macs / self.full[0]:.4f} of the MACs: not its network")
        times = benching.timed_together(graphs, self.target)
        for row in rows:
            key = f"{row['method']} {goal_of(row)}"
            if key in times:
                print(f"{key}: {row['latency_ratio']} -> {times[key]['latency_ratio']} {times[key]['latency_ratios']}", flush=True)
                row.update(times[key])
        write_bytes(self.results, (json.dumps(rows, indent=1) + "\n").encode())

    def tuned(self, graph, name: str):
        if not self.args.epochs:
            return None
        result = benching.channels_last(graph)
        file = self.file(name, ".safetensors")
        if file.exists():
            take_state(result, load_tensors(file))
            return result
        settings, teacher = FineTune(epochs=self.args.epochs, distillation=0.0), None
        if self.args.model:  # no labels: towards the original's outputs
            settings, teacher = replace(settings, learning_rate=RATE, distillation=1.0), benching.channels_last(self.graph)
        checkpoint = self.file(name, "-checkpoint.safetensors")
        fine_tune(result, self.train, settings, teacher, checkpoint)
        save_tensors(file, result.state_dict())
        checkpoint.unlink(missing_ok=True)
        return result


def scores(results: Path) -> None:
    """CC's scores of every layer of a ResNet-50, random weights, gradients drawn from a normal distribution; one row per layer."""
    import torchvision_ops

    torchvision_ops.declare()
    import torchvision

    torch.manual_seed(0)
    graph = compressor.trace(torchvision.models.resnet50().eval(), (torch.zeros(1, 3, 224, 224),))
    plans = UnitPlans(compressor.analyze(graph))
    rows: list[dict] = []
    for name, reason in plans.layers.items():
        if reason is None:
            begun = time.monotonic()
            weight = graph.get_submodule(name).weight.detach().double()
            own = [t.reshape(*t.shape[:2], -1).numpy() for t in (weight, torch.randn_like(weight).square())]
            path = removal_path(Layer(*own, plans.removable(name), True))
            seconds = round(time.monotonic() - begun, 2)
            rows.append(
                {"network": "resnet50", "layer": name, "weight": list(weight.shape), "states": len(path), "seconds": seconds}
            )
            print(f"{name}: {len(path)} states, {seconds:.1f} s", flush=True)
    print(f"ResNet-50: scores of {len(rows)} layers in {sum(row['seconds'] for row in rows):.0f} s")
    write_bytes(results / "cc-scores-resnet50.json", (json.dumps(rows, indent=1) + "\n").encode())


def goal_of(row: dict) -> Goal:
    options = row["options"]
    return Goal(options.get("driver", "macs"), options["asked"], options["align"])


def key_of(row: dict) -> tuple:
    return row["method"], goal_of(row), row["options"]["epochs"]


def line(row: dict) -> str:
    tuned = "" if row["top1_finetuned"] is None else f"{row['top1_finetuned']:.2f}"
    costs = f"{row['macs_ratio']:.3f} | {row['params_ratio']:.3f} | {row['latency_ratio']:.3f}"
    return f"| {row['method']} | {goal_of(row)} | {costs} | {row['top1']:.2f} | {tuned} | {row['seconds']:.0f} s |"


def table(rows: list[dict]) -> str:
    head = ["| method | asked | MACs | parameters | latency | top-1 % | after fine-tune % | decision |", "|" + "---|" * 8]

    def place(row: dict) -> tuple:
        goal = goal_of(row)
        return goal.driver, goal.align, -goal.share, row["top1"]

    return "\n".join([*head, *map(line, sorted(rows, key=place))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_cap.add_network_arguments(parser)
    parser.add_argument("--gradient-images", type=int, default=10_000)
    parser.add_argument("--latencies", default="", help="also: budgets in measured latency, shares of the original's")
    parser.add_argument("--epochs", type=int, default=1, help="of the fine-tune; 0 for none")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--only", default="", help="names of rows, joined by semicolons")
    parser.add_argument("--remeasure", action="store_true", help="time the networks of all rows again, and nothing else")
    parser.add_argument("--scores", action="store_true", help="time the scores of a ResNet-50 instead")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_cc"), help="scores and finished parts")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.scores:
        scores(args.results)
        return
    bench = Bench(args)
    published.squared_gradients = bench.gradients  # type: ignore[attr-defined]  # the same for all rows of a network
    if args.remeasure:
        bench.remeasure()
    goals = [
        Goal(driver, float(text), args.align)
        for driver, texts in (("macs", args.ratios), ("latency", args.latencies))
        for text in texts.split(",")
        if text
    ]
    for goal in () if args.remeasure else goals:
        for name, row in ROWS.items():
            if not args.only or name in args.only.split(";"):
                bench.run(name, row, goal)
    print(table(bench.rows()))


if __name__ == "__main__":
    main()
