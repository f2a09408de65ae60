"""`Allocation`: widths and ranks by loss curves, notch after notch where it costs the least loss for what it saves."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.paths import COSTS, Rows, Widths, fitting, give_back, steepest
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.search_space import BranchAxis
from compressor.passes.fitting.losses import Curve
from compressor.runtime.latency_model.model import LatencyModel
from compressor.values.plan import Plan

POWERS = {"plain": 0.0, "mixed": 0.5, "sensitivity": 1.0}
"""The power of a group's sensitivity that its losses are weighted by."""

RANK_PRICES = (0.5, 1.0, 0.25, None)
"""What the loss of a rank counts for beside that of a channel, the one that is begun with first; None: channels alone."""

BRANCH_PRICES = (1.0, 0.5, 2.0)
"""What the loss of a branch counts for beside that of a channel, the one that is begun with first."""

SAVED = {"milliseconds": (1.0, 0.0), "both": (0.5, 0.5), "macs": (0.0, 1.0)}
"""What a notch saves where latency is limited: shares of the milliseconds of a latency model, and of the MACs.

Milliseconds fall by steps, and where two groups meet in a layer often only once both have taken one: notch by notch, MACs
may lead to the better network of the same latency."""


@dataclass(frozen=True)
class Weighting:
    """How losses compare.

    Attributes:
        weights: By which power of the sensitivities; see `POWERS`.
        price: Of ranks; see `RANK_PRICES`.
        saved: What they are divided by; see `SAVED`.
        branch: What the loss of a branch counts for; see `BRANCH_PRICES`.
    """

    weights: str
    price: float | None = RANK_PRICES[0]
    saved: str = "milliseconds"
    branch: float = 1.0

    def __str__(self) -> str:
        """For the log."""
        ranks = {None: ", channels alone", RANK_PRICES[0]: ""}.get(self.price, f", ranks at {self.price} of their loss")
        branches = "" if self.branch == BRANCH_PRICES[0] else f", branches at {self.branch} of their loss"
        saving = "" if self.saved == "milliseconds" else f", saving {self.saved}"
        return f"losses by {self.weights} weights{ranks}{branches}{saving}"


class Allocation:
    """The structures that loss curves lead to.

    Args:
        problem: With the budget.
        curves: Of every group and axis that may be narrowed.
        latency: Where latency is limited, and the target can be modelled.
    """

    def __init__(self, problem: Problem, curves: Mapping[str, Curve], latency: LatencyModel | None) -> None:
        self._problem, self.curves, self._latency = problem, curves, latency
        self._space = Widths(problem, {name: curve.ranking.scores for name, curve in curves.items()})
        self._paths: dict[Weighting, Rows] = {}

    def ways(self, plan: Plan | None) -> tuple[str, ...]:
        """In what savings can be counted, where this plan is the nearest so far; see `SAVED`."""
        del plan
        return ("milliseconds",) if self._latency is None else tuple(SAVED)

    def decide(self, weighting: Weighting) -> Plan:
        """The plan that meets the budget.

        Raises:
            BudgetError: No structure on the path meets it.
        """
        return fitting(self._space, self.path(weighting), self._costs_of)

    def near(self, weighting: Weighting) -> Plan:
        """A plan near the budget, without measuring anything: a latency is that of the model, or its share of the MACs.

        Raises:
            BudgetError: No structure on the path meets it.
        """
        if "latency" not in self._problem.limits:
            return self.decide(weighting)
        path = self.path(weighting)
        limit = self._problem.limits["latency"] * self._costs_of(path[:1])[0]

        def within(rows: Rows) -> NDArray[np.bool_]:
            return np.asarray(self._space.within(rows) & (self._costs_of(rows) <= limit))

        good = within(path)
        if not good.any():
            raise BudgetError("the budget cannot be met by these groups and ranks alone")
        return self._space.plan(give_back(path, int(np.argmax(good)), within))

    def plan(self, row: Rows) -> Plan:
        """The plan of a structure, (groups,)."""
        return self._space.plan(row)

    def path(self, weighting: Weighting) -> Rows:
        """(structures, groups): from the whole network down."""
        if weighting in self._paths:
            return self._paths[weighting]
        options, losses = self._options(weighting, branches=False)
        sizes = [group.size for group in self._problem.channels.groups]
        found = steepest(sizes, options, losses, lambda rows: self._saved_of(rows, weighting.saved))
        return self._paths.setdefault(weighting, found)

    def _options(self, weighting: Weighting, branches: bool) -> tuple[dict[int, list[int]], dict[int, NDArray[np.float64]]]:
        """Legal widths (ranks, 0 and 1) of every group that has a curve, ascending, and the weighted loss at each."""
        options, losses = {}, {}
        for k, group in enumerate(self._problem.channels.groups):
            own = weighting.price if isinstance(group, RankAxis) else weighting.branch if isinstance(group, BranchAxis) else 1.0
            if isinstance(group, BranchAxis) and not branches:
                continue
            if group.name in self.curves and own is not None:
                curve = self.curves[group.name]
                options[k] = list(widths(group, self._problem.target.align))
                losses[k] = own * curve.ranking.loss[options[k]] * max(curve.sensitivity, 1e-12) ** POWERS[weighting.weights]
        return options, losses

    def _saved_of(self, rows: Rows, saved: str) -> NDArray[np.float64]:
        """What a notch is to save: that of the budget, or of a latency's with MACs in it, as shares of the first structure's."""
        costs = self._costs_of(rows)
        if self._latency is None or saved == "milliseconds":
            return costs
        macs = self._space.costs(rows, ("macs",))["macs"]
        milliseconds, others = SAVED[saved]
        return np.asarray(milliseconds * costs / costs[0] + others * macs / macs[0], dtype=np.float64)

    def _costs_of(self, rows: Rows, missed_by: Rows | None = None) -> NDArray[np.float64]:
        """What is limited: milliseconds, or as shares of their limits the budgets that one structure (the first) does not meet."""
        if self._latency is not None:
            return self._latency.predict(rows)
        limits = {name: limit for name, limit in self._problem.limits.items() if name in COSTS} or {"macs": 1.0}
        found = self._space.costs(rows, limits)
        theirs = found if missed_by is None else self._space.costs(missed_by[None], limits)
        missed = {name: limit for name, limit in limits.items() if theirs[name][0] > limit} or limits
        return np.asarray(sum(found[name] / limit for name, limit in missed.items()), dtype=np.float64)
