"""What a search costs besides judging: rankings per minute, overhead per trial, memory over a thousand trials.

    python tools/bench_overhead.py

The network is a ResNet-56 with random weights on random images: nothing here depends on what it has learnt. A ranking is a draw of
LeGR's parameters taken to the first structure within half the MACs; its peer is the walk channel by channel with the costs
computed anew at each step. Overhead is what passes between the first trial's begin and the last one's end that is not judging
(sampling, decoding, storing in SQLite), beside the time of a trial as the method judges it with the usual images (1,000 of a
hold-out, 500 to repair on); `overhead_share` is its share of both together. Memory is the resident set after 100 trials and
at the end.
In the long runs candidates are judged on few images, so that a thousand of them are soon done. Our own methods are asked for
half the latency, too, by a latency model of ONNX Runtime; leaders are not measured, and widths are multiples of 8 there.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cifar_resnet

import compressor
from compressor.methods import AACP, LeGR, Problem
from compressor.methods.published.legr import NormRanking
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.legal_widths import widths
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.search.fitness import Fitness
from compressor.search.storage import open_storage
from compressor.search.study import OUTCOME
from compressor.values.files import write_bytes
from compressor.values.progress import Progress

_USUAL = 8  # trials that tell what a usual one takes
_MARK = 100  # trials after which memory is looked at for the first time


class Memory(Progress):
    """Looks at the resident set as trials finish."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def tick(self, done: int, total: int | None, text: str) -> None:
        """After every trial."""
        del total, text
        if done % _MARK == 0 and done not in self.at:
            gc.collect()
            self.at[done] = resident_mb()


def resident_mb() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def rankings(problem: Problem, count: int) -> dict[str, float]:
    """Rankings per minute, and those of the walk with costs at each step."""
    groups = problem.channels.groups
    genome = NormRanking(problem)
    options = [widths(group, 1) if group.name in genome.groups else (group.size,) for group in groups]
    ranking, limit = GlobalRanking(groups, options), problem.limits["macs"]
    random = np.random.default_rng(0)
    draws = [
        {name: float(np.exp(random.normal())) if "scale" in name else float(random.normal()) for name in genome.space}
        for _ in range(count)
    ]

    def ours(params: dict[str, float]) -> np.ndarray:
        return ranking.walk(genome.scores(params)).first(lambda rows: problem.channels.costs.macs(rows) <= limit)

    def peer(params: dict[str, float]) -> np.ndarray:
        for row in ranking.walk(genome.scores(params)).path():
            if problem.channels.costs(row[None]).macs[0] <= limit:
                return row
        raise AssertionError

    begun = time.perf_counter()
    found = [ours(params) for params in draws]
    own = time.perf_counter() - begun
    few = max(count // 50, 1)
    begun = time.perf_counter()
    assert all((peer(params) == row).all() for params, row in zip(draws[:few], found[:few], strict=True))
    step = time.perf_counter() - begun
    return {"per_minute": round(60 * count / own), "step_by_step_per_minute": round(60 * few / step)}


def search(problem: Problem, method: LeGR | AACP) -> dict[str, float]:
    """Milliseconds per trial that are not judging, and memory."""
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'study.db'}"
        method.plan(replace(problem, storage=url, progress=memory))
        storage = open_storage(url)
        (summary,) = optuna.get_all_study_summaries(storage)
        trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials(deepcopy=False)
    wall = (trials[-1].datetime_complete - trials[0].datetime_start).total_seconds()
    judging = sum(float(t.user_attrs[OUTCOME]["seconds"]) for t in trials if OUTCOME in t.user_attrs)
    judged = sum(float(t.user_attrs[OUTCOME]["images"]) > 0 for t in trials if OUTCOME in t.user_attrs)
    found = {
        "trials": len(trials), "judging_s": round(judging / judged, 4),
        "overhead_ms": round(1000 * (wall - judging) / len(trials), 2),
    }  # fmt: skip
    if memory.at:
        found |= {"memory_mb_first": round(memory.at[_MARK], 1), "memory_mb_last": round(memory.at[max(memory.at)], 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=2000)
    parser.add_argument("--trials", type=int, default=1000, help="of the methods as published, whose candidates are soon judged")
    parser.add_argument("--own-trials", type=int, default=300, help="of ours, which compensate each candidate")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "search-overhead.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    graph = compressor.trace(cifar_resnet.resnet56().eval(), (torch.zeros(1, 3, 32, 32),))
    channels = compressor.analyze(graph)
    images = torch.randn(1000, 3, 32, 32)
    labels = torch.randint(10, (1000,))
    full = float(channels.costs_of(channels.full).macs[0])
    validate = [(images[k : k + 250], labels[k : k + 250]) for k in range(0, 1000, 250)]
    problem = Problem(
        channels, {"macs": 0.5 * full}, compressor.Target(align=1), lambda plan: SimpleNamespace(ratio=0.49), None, 0,
        validate=validate, calibration=Calibration.read([(images[:500],)], graph, 500),
    )  # fmt: skip
    faster = replace(problem, limits={"latency": 0.5}, target=compressor.Target(align=8))
    rows: list[dict] = [{"what": "rankings of ResNet-56 to half its MACs", **rankings(problem, args.rankings)}]
    print(rows[-1], flush=True)
    few = Fitness("none", objective="metric", holdout=8)
    own = {"probes": 8, "compensation": Compensation(images=64, positions=8), "leaders": 10**6}
    small = Fitness("compensate", holdout=8, images=8)
    for name, asked, make, long in (
        ("LeGR, as published", problem, LeGR.published, {"trials": args.trials, "fitness": few}),
        ("AACP, as published", problem, AACP.published, {"trials": args.trials, "fitness": few}),
        ("LeGR()", problem, partial(LeGR, **own), {"trials": args.own_trials, "fitness": small}),
        ("AACP()", problem, partial(AACP, steps="align", **own), {"trials": args.own_trials, "fitness": small}),
        ("LeGR(), latency", faster, partial(LeGR, **own), {"trials": args.own_trials, "fitness": small}),
        ("AACP(), latency", faster, partial(AACP, steps="align", **own), {"trials": args.own_trials, "fitness": small}),
    ):
        trial = search(asked, make(_USUAL))["judging_s"]
        found = search(asked, replace(make(_USUAL), **long))
        overhead = found["overhead_ms"] / 1000
        rows.append({"what": name, **found, "usual_trial_s": trial, "overhead_share": round(overhead / (overhead + trial), 4)})
        print(rows[-1], flush=True)
        write_bytes(args.results, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
