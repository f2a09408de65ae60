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
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.methods.base import MethodSettings, Problem
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.paths import Widths, fitting
from compressor.passes.criteria import CRITERIA, Scores, Scoring, select
from compressor.passes.fitting.settings import Compensation
from compressor.training.gradients import mean_gradients
from compressor.values.plan import Plan
from compressor.values.settings import check


@dataclass(frozen=True)
class Magnitude(MethodSettings):
    """Prune by a criterion, uniformly or globally.

    Attributes:
        criterion: Name of a criterion (`compressor.passes.criteria.CRITERIA`).
        scope: `uniform` or `global`.
        aggregate: How scores of tied filters become one: `mean`, `sum` or `max`.
        compensation: How the network is repaired after removal; None for not at all.

    Raises:
        BudgetError: A setting is none of these.
    """

    name: ClassVar[str] = "magnitude"
    criterion: str = "l1"
    scope: Literal["uniform", "global"] = "global"
    aggregate: Literal["mean", "sum", "max"] = "sum"
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, known={"criterion": CRITERIA})

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
        path = path_by_scores(problem, scores, self.scope)
        return fitting(Widths(problem, scores), path)


def path_by_scores(problem: Problem, scores: dict[str, Scores], scope: str) -> NDArray[np.int64]:
    """Widths from the whole network down, one notch at a time, (structures, groups).

    Args:
        problem: The network and the target's widths.
        scores: Group name -> score per unit.
        scope: `uniform` or `global`; see the module.
    """
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
