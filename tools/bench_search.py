"""Searches against each other at equal means: trials, hold-out, images, fine-tune.

    python tools/bench_search.py --data DIR --weights resnet56_cifar10.safetensors

DIR is the official binary version of CIFAR-10. All decisions rest on a hold-out of the training images; `top1` is that of
the 10,000 test images, looked at once per row, before any training (norms recalibrated, or layers compensated,
as the method does it) and after the same short fine-tune. Latency is measured, whole engines, original and result in
one session. `seconds` are those of judging candidates; a ranking by loss takes about a minute more, once per network.

`--family` compares families of four budgets instead, by one search each: LeGR as published against ours in a few trials; rows in
`tools/results/family-NETWORK.json`, whose `images` are those of the decision, statistics and probes among them.

`--remeasure` times the networks of the rows of these `--goals`, `--seeds` and `--only` again and nothing else: all of them
beside each other, in three sessions, `latency_ratio` the median of `latency_ratios`. For rows that were made beside other
work, or are to be compared in latency.

Killed, the same command goes on: studies and finished parts lie in `--work`, rows in `tools/results/search-NETWORK.json`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parent))
import benching
import cifar_resnet

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.data.images import load_data
from compressor.methods import AACP, CaP, LeGR, Magnitude, Method, Problem
from compressor.methods.published.legr import PublishedLeGR
from compressor.methods.searching.search_study import images_of
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.product import take_state
from compressor.passes.statistics.calibration import Calibration
from compressor.runtime.measuring.measure import Comparison, measure
from compressor.search.fitness import Fitness
from compressor.search.storage import open_storage
from compressor.search.study import OUTCOME
from compressor.training.evaluate import evaluate
from compressor.training.fine_tune import FineTune
from compressor.training.fine_tune import train as fine_tune
from compressor.values.files import load_tensors, load_weights, read_json, save_tensors, write_bytes, write_json
from compressor.values.plan import Plan

PSAE = Fitness("recalibrate", objective="metric")
CLOSED = Fitness("compensate")


def methods(trials: int) -> dict[str, Callable[[], Method]]:
    """What is compared, by name."""
    rival = AACP.published(trials)
    return {
        "uniform L1": lambda: Magnitude("l1", "uniform", compensation=None),
        "global L1": lambda: Magnitude("l1", "global", compensation=None),
        "CaP, no search": CaP,
        "random": lambda: replace(rival, sampler="random"),
        "TPE": lambda: replace(rival, sampler="tpe"),
        "CMA-ES": lambda: replace(rival, sampler="cmaes"),
        "LeGR, as published": lambda: LeGR.published(trials),
        "LeGR, as published, recalibrated": lambda: replace(LeGR.published(trials), fitness=Fitness("recalibrate")),
        "LeGR, as published, 10 steps of training": lambda: LeGR.published(trials, steps=10),
        "LeGR, compensated": lambda: LeGR(trials, CLOSED),
        "LeGR, compensated, original's features": lambda: LeGR(trials, replace(CLOSED, features="original")),
        "LeGR, compensated, channels and ranks": lambda: LeGR(trials, CLOSED, space="channels+ranks"),
        "AACP, as published": lambda: AACP.published(trials),
        "AACP, staircase, compensated": lambda: AACP(trials, CLOSED),
        "AACP, multiples, compensated": lambda: AACP(trials, CLOSED, steps="align"),
        "TPE, staircase, compensated": lambda: AACP(trials, CLOSED, sampler="tpe"),
        "random, staircase, compensated": lambda: AACP(trials, CLOSED, sampler="random"),
    }


FAMILY = (0.8, 0.65, 0.5, 0.35)  # of the MACs
FAMILIES: dict[str, Callable[[], PublishedLeGR]] = {
    "LeGR, as published, 120 trials": lambda: LeGR.published(120),
    "LeGR, compensated, 4 trials": lambda: LeGR(
        4, replace(CLOSED, holdout=500, images=250), probes=64, population=2, compensation=Compensation(images=1000)
    ),
}


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        model = getattr(cifar_resnet, args.network)()
        load_weights(model, Path(args.weights))
        data = load_data(f"cifar10:{args.data}", 250)
        self.data, self.train = data, load_data(f"cifar10:{args.data}", 128, args.train_images).train
        self.graph = compressor.trace(model.eval(), (torch.zeros(1, 3, 32, 32),))
        self.channels = compressor.analyze(self.graph)
        self.calibration = Calibration.read(data.plain, self.graph, 2000)
        self.full = float(self.channels.costs_of(self.channels.full).macs[0])
        self.target = compressor.Target(align=args.align)
        self.results = args.results / f"search-{args.network}.json"

    def rows(self) -> list[dict]:
        return json.loads(self.results.read_text()) if self.results.exists() else []

    def problem(self, driver: str, ratio: float, seed: int, folder: Path, comparison: Comparison) -> Problem:
        limits = {"macs": ratio * self.full} if driver == "macs" else {"latency": ratio}

        def once(name: str, work: Callable[[], dict]) -> dict:
            # staircases and prices depend on network and data alone: all methods share them
            file = self.args.work / f"{self.args.network}-once.json"
            known = read_json(file) if file.exists() else {}
            if name not in known:
                found = work()
                known = (read_json(file) if file.exists() else {}) | {name: found}  # another process may have written
                write_json(file, known)
            return known[name]

        return Problem(
            self.channels, limits, self.target, partial(benching.measured_in, comparison, self.channels), self.train, seed,
            validate=self.data.validate, calibration=self.calibration, progress=ConsoleProgress(),
            storage=f"sqlite:///{folder / 'study.db'}", once=once,
        )  # fmt: skip

    def run(self, name: str, method: Method, driver: str, ratio: float, seed: int) -> None:
        key = (name, driver, ratio, seed, getattr(method, "trials", 0), self.args.epochs, self.args.align)
        if key in {key_of(row) for row in self.rows()}:
            return
        print(f"\n== {name}, {driver} {ratio:g}, seed {seed}", flush=True)
        folder = self.folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        plan = self.search(method, driver, ratio, seed, folder)
        graph = self.repaired(plan, method, seed)
        begun = time.monotonic()
        layout = benching.channels_last(graph)
        top1 = evaluate(layout, self.data.test).value
        print(f"   {top1:.2f} % before training", flush=True)
        finetuned, tuned = layout, folder / f"finetuned-{self.args.epochs}-{self.args.train_images}.safetensors"
        if tuned.exists():
            take_state(finetuned, load_tensors(tuned))
        elif self.args.epochs:
            settings = FineTune(epochs=self.args.epochs, distillation=0.0)
            fine_tune(finetuned, self.train, settings, checkpoint=folder / "checkpoint.safetensors", seed=seed)
            save_tensors(tuned, finetuned.state_dict())
        found = measure({"original": self.graph, "compressed": graph}, self.target, seed)
        images, seconds = self.spent(folder)
        row = {
            "network": self.args.network, "method": name,
            "options": {**_plain(method), "seed": seed, "asked": ratio, "epochs": self.args.epochs, "align": self.args.align},
            "driver": driver, "target": {k: str(v) for k, v in found["original"].target.items()},
            "macs_ratio": self.share(plan), "latency_ratio": round(found["compressed"].ratio_to(found["original"]), 4),
            "top1": round(top1, 2), "top1_finetuned": round(evaluate(finetuned, self.data.test).value, 2),
            "images": images, "seconds": round(seconds, 1),
        }  # fmt: skip
        print(f"   {row['top1_finetuned']:.2f} % after {self.args.epochs} epochs ({time.monotonic() - begun:.0f} s)", flush=True)
        write_bytes(self.results, (json.dumps([*self.rows(), row], indent=1) + "\n").encode())
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def repaired(self, plan: Plan, method: Method, seed: int) -> GraphModule:
        return benching.repaired(self.channels, plan, self.calibration, method.compensation, seed)

    def families(self, seed: int) -> None:
        file = self.args.results / f"family-{self.args.network}.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        for name, make in FAMILIES.items():
            if any((row["method"], row["options"]["seed"]) == (name, seed) for row in rows):
                continue
            method = make()
            folder = self.folder((name.rpartition(",")[0], "macs", min(FAMILY), seed, method.trials, 0, self.args.align))
            folder.mkdir(parents=True, exist_ok=True)
            with Comparison(self.graph, self.target, seed) as comparison:
                plans = method.plans([self.problem("macs", ratio, seed, folder, comparison) for ratio in FAMILY])
            images, seconds = self.spent(folder)
            if method.ranking == "loss":  # statistics, the original once, a probe of every group as if it ran from the beginning
                images += method.compensation.images + method.fitness.images + method.probes * len(self.channels.free)
            found = [benching.channels_last(self.repaired(plan, method, seed)) for plan in plans]
            row = {
                "network": self.args.network, "method": name, "options": {**_plain(method), "seed": seed}, "driver": "macs",
                "macs_ratio": [self.share(plan) for plan in plans],
                "top1": [round(evaluate(graph, self.data.test).value, 2) for graph in found],
                "images": images, "seconds": round(seconds, 1),
            }  # fmt: skip
            print(f"{name}: {row['macs_ratio']} of the MACs, {row['top1']} %, {images:,} images, {seconds:.0f} s", flush=True)
            rows.append(row)
            write_bytes(file, (json.dumps(rows, indent=1) + "\n").encode())

    def share(self, plan: Plan) -> float:
        return round(float(self.channels.costs_of(self.channels.structure(plan)).macs[0]) / self.full, 4)

    def folder(self, key: tuple) -> Path:
        name, driver, ratio, seed, trials, _, align = key
        text = f"{self.args.network} {name} {driver} {ratio:g} {seed} {trials} {align}".lower()
        return self.args.work / "".join(c if c.isalnum() else "-" for c in text)

    def remeasure(self) -> None:
        """Times networks of rows together: what the machine does to one of them in a session it does to all."""
        rows, args = self.rows(), self.args
        chosen, graphs = dict[str, dict](), {"original": self.graph}
        for row in rows:
            asked = f"{row['driver']}:{row['options']['asked']:g}" in args.goals.split(",")
            asked = asked and str(row["options"]["seed"]) in args.seeds.split(",")
            if not asked or (args.only and row["method"] not in args.only.split(";")):
                continue
            folder = self.folder(key_of(row))
            if not (folder / "plan.json").exists():
                print(f"no plan is left of {row['method']}, {row['driver']} {row['options']['asked']:g}")
                continue
            chosen[folder.name] = row
            graphs[folder.name] = compressor.apply(Plan.load(folder / "plan.json"), self.graph).eval()
        for name, found in benching.timed_together(graphs, self.target).items():
            if name in chosen:
                print(f"{name}: {chosen[name]['latency_ratio']} -> {found['latency_ratio']} {found['latency_ratios']}", flush=True)
                chosen[name].update(found)
        write_bytes(self.results, (json.dumps(rows, indent=1) + "\n").encode())

    def search(self, method: Method, driver: str, ratio: float, seed: int, folder: Path) -> Plan:
        file = folder / "plan.json"
        if file.exists():
            return Plan.load(file)
        with Comparison(self.graph, self.target, seed) as comparison:
            plan = method.plan(self.problem(driver, ratio, seed, folder, comparison))
        write_bytes(file, plan.to_json().encode())
        return plan

    def spent(self, folder: Path) -> tuple[int, float]:
        """Images and seconds that judging candidates took, however often the search was interrupted."""
        if not (folder / "study.db").exists():
            return 0, 0.0
        import optuna

        storage = open_storage(f"sqlite:///{folder / 'study.db'}")
        summary = max(optuna.get_all_study_summaries(storage), key=lambda s: s.datetime_start)  # others are of earlier versions
        trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials(deepcopy=False)
        judged = [t for t in trials if OUTCOME in t.user_attrs]
        return images_of(judged), sum(float(t.user_attrs[OUTCOME]["seconds"]) for t in judged)


def _plain(method: Method) -> dict:
    kept = (
        "trials",
        "sampler",
        "space",
        "fitness",
        "ranking",
        "aggregate",
        "steps",
        "streams",
        "population",
        "samples",
        "identity",
    )
    found = method.to_dict()
    return {**{name: found[name] for name in kept if name in found}, "compensated": method.compensation is not None}


def key_of(row: dict) -> tuple:
    options = row["options"]
    return row["method"], row["driver"], *(options.get(name, 0) for name in ("asked", "seed", "trials", "epochs", "align"))


def table(rows: list[dict]) -> str:
    head = ["method", "asked", "seed", "MACs", "latency", "top-1 %", "after fine-tune %", "images", "search"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda r: (r["driver"], -r["options"]["asked"], r["top1"])):
        cells = (
            row["method"], f"{row['driver']} {row['options']['asked']:g}", row["options"]["seed"], f"{row['macs_ratio']:.3f}",
            f"{row['latency_ratio']:.3f}", f"{row['top1']:.2f}", f"{row['top1_finetuned']:.2f}", f"{row['images']:,}",
            f"{row['seconds']:.0f} s",
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--data", required=True, help="folder of the official binary version of CIFAR-10")
    parser.add_argument("--weights", required=True, help=".safetensors of the network")
    parser.add_argument("--goals", default="macs:0.5,latency:0.5,macs:0.35", help="drivers and shares of the original")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=2, help="of the fine-tune; 0 for none")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--align", type=int, default=1)
    parser.add_argument("--family", action="store_true", help="families of four budgets instead")
    parser.add_argument("--remeasure", action="store_true", help="time the networks of rows again")
    parser.add_argument("--only", default="", help="names of methods, joined by semicolons")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_search"), help="studies and finished parts")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bench = Bench(args)
    if args.family:
        for text in args.seeds.split(","):
            bench.families(int(text))
        return
    if args.remeasure:
        bench.remeasure()
    for seed in () if args.remeasure else (int(text) for text in args.seeds.split(",")):
        for goal in args.goals.split(","):
            driver, _, share = goal.partition(":")
            for name, method in methods(args.trials).items():
                if not args.only or name in args.only.split(";"):
                    bench.run(name, method(), driver, float(share), seed)
    print(table(bench.rows()))


if __name__ == "__main__":
    main()
