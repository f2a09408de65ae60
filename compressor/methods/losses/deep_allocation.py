"""`DeepAllocation`: branches, widths and ranks by their losses, all at once (`knapsack.py`)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BackendError, BudgetError
from compressor.methods.base import Problem
from compressor.methods.losses.allocation import Allocation, Weighting
from compressor.methods.structures.knapsack import Knapsack, Unit
from compressor.methods.structures.paths import AIM, CLOSE, Rows
from compressor.passes.channels.search_space import columns_within
from compressor.passes.fitting.losses import Curve
from compressor.runtime.latency_model.model import LatencyModel
from compressor.values.plan import Plan

_STARTS = 16  # streams of the path by channels and ranks alone that a search begins from
_MEASURED = 6  # engines that are built to meet a latency
_HALVINGS = 20
_ALL_AT_ONCE = "milliseconds"  # of `SAVED`; the others are those of notches, and leave branches alone


class DeepAllocation(Allocation):
    """The structures that losses lead to where branches may go; see `Allocation` for the arguments."""

    def __init__(self, problem: Problem, curves: Mapping[str, Curve], latency: LatencyModel | None) -> None:
        super().__init__(problem, curves, latency)
        self._knapsacks: dict[Weighting, Knapsack] = {}

    def ways(self, plan: Plan | None) -> tuple[str, ...]:
        """What a budget limits is what is counted; where every branch stays, also as if none could go."""
        return (_ALL_AT_ONCE,) if plan is None or plan.removed else super().ways(plan)

    def near(self, weighting: Weighting) -> Plan:
        """See `Allocation`."""
        if weighting.saved != _ALL_AT_ONCE:
            return super().near(weighting)
        if "latency" not in self._problem.limits:
            return self.decide(weighting)
        return self._space.plan(self._solved(weighting, self._aim * self._whole))

    def decide(self, weighting: Weighting) -> Plan:
        """The plan that meets the budget.

        Raises:
            BudgetError: No structure does.
            BackendError: No engine of one can be built.
        """
        if weighting.saved != _ALL_AT_ONCE:
            return super().decide(weighting)
        if "latency" not in self._problem.limits:
            return self._space.plan(self._solved(weighting, self._whole))
        limit, asked = self._problem.limits["latency"], self._aim
        best: tuple[float, Plan] | None = None
        failure: BackendError | None = None
        closest = np.inf
        for _ in range(_MEASURED):
            plan = self._space.plan(self._solved(weighting, asked * self._whole))
            try:
                found = self._problem.measure(plan).ratio
            except BackendError as error:
                failure = error
                break
            closest = min(closest, found)
            if found <= AIM * limit and (best is None or found > best[0]):
                best = found, plan
            if CLOSE * limit <= found <= AIM * limit:
                break
            asked *= self._aim / found  # what the model is off by here
        if best is not None:
            return best[1]
        if failure is not None:
            raise failure
        raise BudgetError(f"the budget cannot be met: the closest network measured takes {closest:.3f} of the latency")

    def path(self, weighting: Weighting) -> Rows:
        """Structures for a ladder of budgets, the whole network first; (structures, groups)."""
        if weighting.saved != _ALL_AT_ONCE:
            return super().path(weighting)
        whole, least = self._whole, self._knapsack(weighting).cheapest
        rows = [super().path(weighting)[0]]
        for share in np.geomspace(0.98, max(1.02 * least / whole, 1e-3), _STARTS):
            row = self._knapsack(weighting).solve(share * whole, rows[-1:])
            if row is not None:
                rows.append(row)
        return np.stack(rows)

    @property
    def _aim(self) -> float:
        return 0.5 * (CLOSE + AIM) * self._problem.limits["latency"]

    @property
    def _whole(self) -> float:
        return float(self._price(self._row_of_all[None])[0])

    @property
    def _row_of_all(self) -> Rows:
        return np.array([group.size for group in self._problem.channels.groups], dtype=np.int64)

    def _price(self, rows: Rows) -> NDArray[np.float64]:
        """Of which budgets depends on the whole network alone, so that it adds up over branches."""
        return self._costs_of(rows, self._row_of_all)

    def _solved(self, weighting: Weighting, limit: float) -> Rows:
        """The structure at the largest price up to a limit at which everything that can be computed is within the budget.

        Raises:
            BudgetError: There is none.
        """
        knapsack, streams = self._knapsack(weighting), self._streams(weighting)
        low, high, best = 0.0, limit, None
        for step in range(_HALVINGS):
            middle = 0.5 * (low + high) if step else limit
            row = knapsack.solve(middle, streams)
            if row is not None and self._space.within(row[None])[0]:
                low, best = middle, row
            elif row is None:
                low = middle
            else:
                high = middle
            if low >= limit:
                break
        if best is None:
            share = knapsack.cheapest / self._whole
            raise BudgetError(
                f"the budget cannot be met: the smallest network without a branch still costs {share:.3f} of the whole one; "
                "ask for more, or search more axes (space=channels+ranks+depth)"
            )
        return best

    def _streams(self, weighting: Weighting) -> list[Rows]:
        path = super().path(replace(weighting, saved=_ALL_AT_ONCE))
        return [path[k] for k in np.linspace(0, len(path) - 1, _STARTS).astype(int)]

    def _knapsack(self, weighting: Weighting) -> Knapsack:
        if weighting not in self._knapsacks:
            options, losses = self._options(weighting, branches=True)
            within = {branch: own for branch, own in columns_within(self._problem.channels).items() if 0 in options.get(branch, ())}
            inner = {column for own in within.values() for column in own}
            units = [Unit(branch, own) for branch, own in within.items() if branch not in inner]
            self._knapsacks[weighting] = Knapsack(self._row_of_all, options, losses, units, self._price)
        return self._knapsacks[weighting]
