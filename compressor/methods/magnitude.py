"""`Magnitude`: the plain baseline every paper compares with, on any budget.

The widths of all groups are lowered notch by notch along one path, from the whole network to the
smallest legal one; the first structure on it that meets the budget is the answer.

* `uniform`: a notch is due when the pruning ratio passes the middle between two widths, so all layers
  lose about the same share.
* `global`: a notch is due by the mean score of the channels it would remove, so layers whose channels
  matter little lose more. Scores of tied filters are *summed* by default: a channel of a residual stream is
  made by many layers and costs as many times as much. On ResNet-56/CIFAR-10 at half the MACs that is the
  difference between a usable and a ruined network (`python tools/bench_cifar.py`, rows `sum` and `mean`).

MACs, parameters and memory of the whole path are computed at once; what the last notch removed in excess
is given back where the budget allows. For a latency budget the path is bisected by building and
measuring engines.
"""

import itertools
import logging
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.gradients import mean_gradients
from compressor.methods.base import Problem
from compressor.passes.criteria import CRITERIA, Scores, Scoring, select
from compressor.plan import Plan
from compressor.space import widths

logger = logging.getLogger(__name__)

_CLOSE = 0.97  # a measured latency from here up to the budget ends the bisection
_AIM = 0.985  # of the latency budget: what the search accepts, so that the final measurement holds too


@dataclass(frozen=True)
class Magnitude:
    """Prune by a criterion, uniformly or globally.

    Attributes:
        criterion: Name of a criterion (`compressor.passes.criteria.CRITERIA`).
        scope: `uniform` or `global`.
        aggregate: How scores of tied filters become one: `mean`, `sum` or `max`.

    Raises:
        BudgetError: A setting is none of these.
    """

    criterion: str = "l1"
    scope: Literal["uniform", "global"] = "global"
    aggregate: Literal["mean", "sum", "max"] = "sum"

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, known in (
            ("criterion", tuple(CRITERIA)),
            ("scope", ("uniform", "global")),
            ("aggregate", ("mean", "sum", "max")),
        ):
            if getattr(self, name) not in known:
                raise BudgetError(f"Magnitude({name}={getattr(self, name)!r}): known are {', '.join(known)}")

    @property
    def name(self) -> str:
        """As the command knows it."""
        return "magnitude"

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {"name": self.name, **asdict(self)}

    def scores(self, problem: Problem) -> dict[str, Scores]:
        """Scores of every free group."""
        gradients = None
        if self.criterion == "taylor":
            gradients = mean_gradients(problem.channels.graph, problem.train)
        scoring = Scoring(problem.channels, gradients)
        options = {"seed": problem.seed} if self.criterion == "random" else {"aggregate": self.aggregate}
        criterion = CRITERIA[self.criterion](**options)
        return {group.name: criterion(scoring, group) for group in problem.channels.free}

    def plan(self, problem: Problem) -> Plan:
        """Walk the path until the budget is met.

        Raises:
            BudgetError: No structure on the path meets it; the closest is said.
            DataError: The criterion needs data that is not there.
        """
        scores = self.scores(problem)
        path = _path(problem, scores, self.scope)
        first = _first_within(problem, path)
        if "latency" in problem.limits:
            index = _bisect_latency(problem, scores, path, first)
            widths_found = path[index]
        else:
            widths_found = _give_back(problem, path, first)
        return _resolve(problem, scores, widths_found)


def _path(problem: Problem, scores: dict[str, Scores], scope: str) -> NDArray[np.int64]:
    """(structures, groups): widths from the whole network down, one notch at a time."""
    groups = problem.channels.groups
    notches: list[tuple[float, int, int, int]] = []
    for k, group in enumerate(groups):
        if group.frozen is not None:
            continue
        options = widths(group, problem.target.align)[::-1]
        kept = [set(select(group, scores[group.name], width)) for width in options]
        due = 0.0
        for step, (before, after) in enumerate(itertools.pairwise(kept)):
            if scope == "uniform":
                cost = 1 - (len(before) + len(after)) / (2 * group.size)
            else:
                cost = float(scores[group.name][sorted(before - after)].mean())
            due = max(due, cost)  # a group's notches come in order
            notches.append((due, k, step, len(after)))
    rows = [[group.size for group in groups]]
    for _, k, _, width in sorted(notches):
        rows.append(list(rows[-1]))
        rows[-1][k] = width
    return np.array(rows, dtype=np.int64)


def _within(problem: Problem, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which structures meet the budgets that can be computed."""
    costs = problem.channels.costs(rows)
    found = {"macs": costs.macs, "params": costs.params, "memory": costs.memory_bytes}
    good = np.ones(len(rows), dtype=bool)
    for name, limit in problem.limits.items():
        if name in found:
            good &= found[name] <= limit
    return good


def _first_within(problem: Problem, path: NDArray[np.int64]) -> int:
    good = _within(problem, path)
    if good.any():
        return int(np.argmax(good))
    smallest = problem.channels.costs(path[-1:])
    closest = {"macs": smallest.macs[0], "params": smallest.params[0], "memory": smallest.memory_bytes[0]}
    wanted = {name: limit for name, limit in problem.limits.items() if name in closest}
    said = ", ".join(f"{name} {closest[name]:,} (asked: {limit:,.0f})" for name, limit in wanted.items())
    raise BudgetError(
        f"the budget cannot be met: the smallest legal network has {said}; "
        "widths are multiples of the target's `align`, a smaller one allows narrower layers"
    )


def _give_back(problem: Problem, path: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """Undo notches, the latest first, as long as the budget still holds."""
    current: NDArray[np.int64] = path[first].copy()
    for index in range(first, 0, -1):
        group = int(np.argmax(path[index - 1] != path[index]))
        if path[index][group] == current[group]:
            wider = current.copy()
            wider[group] = path[index - 1][group]
            if _within(problem, wider[None])[0]:
                current = wider
    return current


def _bisect_latency(problem: Problem, scores: dict[str, Scores], path: NDArray[np.int64], first: int) -> int:
    """First structure on the path whose measured latency is within the budget.

    Latency is guessed to fall with MACs between the two measured neighbours, which needs fewer engines
    than halving the interval.
    """
    limit = problem.limits["latency"]
    macs = problem.channels.costs(path).macs.astype(float)

    def ratio_at(index: int) -> float:
        found = problem.measure(_resolve(problem, scores, path[index])).ratio
        logger.info("magnitude: notch %d of %d takes %.3f of the original, budget %.3f", index, len(path) - 1, found, limit)
        return found

    low, low_ratio = first, ratio_at(first) if first > 0 else 1.0
    if low_ratio <= limit:
        return first
    high = len(path) - 1
    high_ratio = ratio_at(high)
    if high_ratio > limit:
        raise BudgetError(
            f"the latency budget cannot be met: the smallest legal network takes {high_ratio:.3f} of the original's "
            f"latency, asked for is {limit:.3f}; a smaller `align` of the target allows narrower layers"
        )
    while high - low > 1 and not _CLOSE * limit <= high_ratio <= _AIM * limit:
        wanted = 0.5 * (_CLOSE + _AIM) * limit
        share = float(np.clip((low_ratio - wanted) / max(low_ratio - high_ratio, 1e-12), 0.1, 0.9))
        goal = macs[low] + share * (macs[high] - macs[low])
        middle = int(np.clip(np.searchsorted(-macs, -goal), low + 1, high - 1))
        found = ratio_at(middle)
        if found <= _AIM * limit:
            high, high_ratio = middle, found
        else:
            low, low_ratio = middle, found
    return high


def _resolve(problem: Problem, scores: dict[str, Scores], row: NDArray[np.int64]) -> Plan:
    """The plan that keeps the best-scored channels of a structure."""
    kept = {}
    for group, width in zip(problem.channels.groups, row.tolist(), strict=True):
        if width < group.size:
            kept[group.name] = select(group, scores[group.name], width)
    return Plan.keep(kept, problem.channels.digest)
