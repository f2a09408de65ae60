"""Depth beside widths and ranks, at equal measured latency: accuracy without a gradient step, and after a short fine-tune.

    python tools/bench_depth.py --data DIR --weights resnet56_cifar10.safetensors
    python tools/bench_depth.py --network mobilenetv2 --model FILE.py:CALLABLE --images FOLDER --test FOLDER --offset 1 \
        --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --latencies 0.7,0.5

DIR is the official binary version of CIFAR-10. Statistics are those of 2,000 training images without labels, decisions look at
images of the training set, `top1` is that of the test images. `seconds` are those of the whole decision, but for engines that an
earlier row has built. Networks of one latency are timed beside each other in one session. `--mimic` trains each
for so many steps to give the original's features, on `--few` images without labels (`top1_finetuned`).

Killed, the same command goes on: plans, facts and engines lie in `--work`, rows in `tools/results/depth-NETWORK.json`.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_cap
import benching
from practise import practise

import compressor
from compressor.cli.console import ConsoleProgress
from compressor.errors import BudgetError
from compressor.methods import AACP, CaP, LeGR, Problem
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.measuring.measure import Comparison
from compressor.training.evaluate import evaluate
from compressor.training.mimic import Mimic, mimic
from compressor.values.files import write_bytes
from compressor.values.plan import Plan

SPACES = ("channels", "depth", "ranks", "channels+depth", "channels+ranks+depth")


class Facts:
    """What was computed once, and how long that took: a later plan that needs it is charged for it."""

    def __init__(self, path: Path) -> None:
        self._path, self.charged = path, 0.0
        self._known = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name, work):
        if name not in self._known:
            begun = time.monotonic()
            self._known[name] = {"found": work(), "seconds": time.monotonic() - begun}
            write_bytes(self._path, json.dumps(self._known).encode())
        else:
            self.charged += self._known[name]["seconds"]
        return self._known[name]["found"]


class Bench(bench_cap.Bench):
    def __init__(self, args: argparse.Namespace) -> None:
        self.work = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        os.environ["COMPRESSOR_CACHE"] = str(self.work / "cache")
        self.target = compressor.Target(align=args.align)
        super().__init__(args)
        self.facts = Facts(self.work / "facts.json")
        self.few = self.calibration.first(args.few)

    def add(self, method, options, ratio, graph, seconds) -> None:
        """Only the original, which every row is beside; rows of a latency are written together."""
        del options, ratio, seconds
        self.original = evaluate(graph, self.test).value
        print(f"{self.args.network}, {method}: {self.original:.2f} %", flush=True)

    def decided(self, method, limit: float) -> tuple[Plan | str, float]:
        """The plan of a method, and the seconds that it took; or why there is none."""
        space = "" if method.space == "channels" else f"-{method.space}"
        file = self.work / f"{self.args.network}-{method.name}{space}-{limit:g}.json"
        if not file.exists():
            begun, self.facts.charged = time.monotonic(), 0.0
            with Comparison(self.graph, self.target) as comparison, ConsoleProgress() as progress:
                problem = Problem(
                    self.channels, {"latency": limit}, self.target,
                    lambda plan: benching.measured_in(comparison, self.channels, plan), None, 0, self.holdout, self.calibration,
                    once=self.facts.once, progress=progress, storage=f"sqlite:///{self.work / 'study.db'}",
                )  # fmt: skip
                try:
                    found = json.loads(method.plan(problem).to_json())
                except BudgetError as error:
                    found = str(error)
            record = {"plan": found, "seconds": time.monotonic() - begun + self.facts.charged}
            write_bytes(file, json.dumps(record).encode())
        record = json.loads(file.read_text())
        found = record["plan"]
        return found if isinstance(found, str) else Plan.from_json(json.dumps(found)), record["seconds"]

    def repaired(self, plan: Plan, method):
        """With what the row's method is given: PRACTISE has no closed form, it trains."""
        if method.name == "practise":
            return applied(plan, self.channels).eval()
        return benching.repaired(self.channels, plan, self.calibration, method.compensation)

    def at(self, limit: float, methods) -> None:
        """The rows of one latency."""
        rows, graphs = [], {"original": self.graph}
        for method in methods:
            plan, seconds = self.decided(method, limit)
            options = {"asked": limit, **method_options(method)}
            if self.args.mimic:
                options |= {"mimic": self.args.mimic, "mimicked_images": self.few.images}
            row = {"network": self.args.network, "method": method.name, "space": method.space, "options": options}
            rows.append(row)
            if isinstance(plan, str):
                row.update(failure=plan, seconds=round(seconds, 1))
                continue
            graph = self.repaired(plan, method)
            name = f"{method.name} {method.space}"
            graphs[name] = graph
            macs = float(self.channels.costs_of(self.channels.structure(plan)).macs[0]) / self.full
            row.update(
                branches=len(plan.removed), macs_ratio=round(macs, 4), top1=round(evaluate(graph, self.test).value, 2),
                top1_finetuned=self.finetuned(plan, graph), images=self.calibration.images, seconds=round(seconds, 1),
            )  # fmt: skip
        timed = benching.timed_together(graphs, self.target)
        for row in rows:
            row.update(timed.get(f"{row['method']} {row['space']}", {}))
            print(line(row), flush=True)
        path = self.args.results / f"depth-{self.args.network}.json"
        key = ("method", "space")
        known = json.loads(path.read_text()) if path.exists() else []
        mine = {(*[row[k] for k in key], row["options"]["asked"]) for row in rows}
        kept = [row for row in known if (*[row[k] for k in key], row["options"]["asked"]) not in mine]
        write_bytes(path, bench_cap.as_json([*kept, *rows]))

    def finetuned(self, plan, graph) -> float | None:
        """After feature mimicking, and after nothing else."""
        if not self.args.mimic:
            return None
        own = benching.channels_last(graph)
        begun = time.monotonic()
        found = mimic(own, self.channels, plan, self.few, Mimic(steps=self.args.mimic))
        seconds = time.monotonic() - begun
        print(f"features: {found.before:.4f} -> {found.after:.4f} of their squares, {seconds:.0f} s", flush=True)
        return round(evaluate(own.eval(), self.test).value, 2)


@dataclass(frozen=True)
class Practise:
    """As a method; see `practise.py`."""

    bench: Bench
    steps: int
    name: ClassVar[str] = "practise"
    space: ClassVar[str] = "depth"
    compensation: ClassVar[None] = None

    def plan(self, problem: Problem) -> Plan:
        with Comparison(self.bench.graph, self.bench.target) as comparison:
            limit = problem.limits["latency"]
            return practise(self.bench.channels, self.bench.few, comparison, limit, Mimic(steps=self.steps))[0]


def method_options(method) -> dict[str, object]:
    if method.name == "practise":
        return {"adaptor_steps": method.steps}
    return {} if method.name == "cap" else {"trials": method.trials}


def line(row: dict) -> str:
    said = f"{row['options']['asked']:.2f}  {row['method']:5} {row['space']:22}"
    if "failure" in row:
        return f"{said} {row['failure']}"
    tuned = "" if row["top1_finetuned"] is None else f" -> {row['top1_finetuned']:.2f}"
    return (
        f"{said} {row['latency_ratio']:.3f} of the latency, {row['macs_ratio']:.3f} of the MACs, "
        f"{row['branches']:2} branches gone: {row['top1']:.2f}{tuned} %, {row['seconds']:.0f} s"
    )


def table(rows: list[dict]) -> str:
    """Markdown: a line per latency and space, the widest latency first."""
    columns = ["asked", "what may go", "latency", "MACs", "branches gone", "top-1 %", "mimicked", "time"]
    if not any(row.get("top1_finetuned") for row in rows):
        columns.remove("mimicked")
    lines = [f"| {' | '.join(columns)} |", f"|---:|---|{'---:|' * (len(columns) - 2)}"]
    for row in sorted(rows, key=lambda row: (-row["options"]["asked"], row["method"], row["space"])):
        cells = {"asked": f"{row['options']['asked']:.2f}", "what may go": f"`{row['method']}`: {row['space'].replace('+', ', ')}"}
        if "failure" in row:
            cells["latency"] = "cannot be met"
        else:
            cells |= {"latency": f"{row['latency_ratio']:.3f}", "MACs": f"{row['macs_ratio']:.3f}"}
            cells |= {"branches gone": str(row["branches"]), "top-1 %": f"{row['top1']:.2f}"}
            cells["mimicked"] = f"{row['top1_finetuned']:.2f}" if row.get("top1_finetuned") else ""
        cells["time"] = f"{row['seconds']:.0f} s"
        lines.append("| " + " | ".join(cells.get(column, "") for column in columns) + " |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_cap.add_network_arguments(parser)
    parser.add_argument("--latencies", default="0.7,0.5,0.35", help="shares of the original's measured latency")
    parser.add_argument("--spaces", default=",".join(SPACES), help="of CaP")
    parser.add_argument("--searches", default="", help="also LeGR and AACP over this space, such as channels+depth")
    parser.add_argument("--trials", type=int, default=120, help="of these searches")
    parser.add_argument("--practise", type=int, default=0, help="also PRACTISE, with so many steps for each block's adaptors")
    parser.add_argument("--mimic", type=int, default=0, help="steps of feature mimicking, without labels, after the repair")
    parser.add_argument("--few", type=int, default=500, help="images that PRACTISE and feature mimicking see")
    parser.add_argument("--work", type=Path, default=Path("build/bench-depth"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.set_defaults(align=8)
    args = parser.parse_args()
    torch.set_num_threads(2)
    bench = Bench(args)
    methods = [CaP(space=space) for space in args.spaces.split(",") if space]
    if args.searches:
        methods += [kind(trials=args.trials, space=args.searches) for kind in (LeGR, AACP)]
    if args.practise:
        methods.append(Practise(bench, args.practise))
    for limit in (float(text) for text in args.latencies.split(",")):
        bench.at(limit, methods)
    print(table(json.loads((args.results / f"depth-{args.network}.json").read_text())))


if __name__ == "__main__":
    main()
