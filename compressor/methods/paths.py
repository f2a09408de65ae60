"""Structures on a path from the whole network down, and where on it a budget is met; shared by the methods that walk one."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.passes.criteria import Scores, select
from compressor.plan import Factorization, Plan

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]
Price = Callable[[Rows], NDArray[np.float64]]
"""Of structures, (structures, groups) to (structures,): what is to be saved."""

COSTS = ("macs", "params", "memory")
_CLOSE = 0.97  # a measured latency from here up to the budget ends the bisection
AIM = 0.985  # of the latency budget: what the search accepts, so that the final measurement holds too
_HORIZON = 4  # how many notches of one group are looked at together


def steepest(
    start: Sequence[int],
    options: Mapping[int, Sequence[int]],
    losses: Mapping[int, NDArray[np.float64]],
    cost: Price,
) -> Rows:
    """The path on which every notch costs the least loss for what it saves.

    Args:
        start: Width of every group.
        options: Group index -> its legal widths, ascending.
        losses: Group index -> the loss at each of these.
        cost: Of structures; what a notch saves is counted on the structure it is taken from.

    Returns:
        (structures, groups), from `start` to the narrowest.
    """
    rows = [np.array(start, dtype=np.int64)]
    at = {k: len(widths) - 1 for k, widths in options.items()}
    while True:
        candidates = [(k, n) for k in options for n in range(max(at[k] - _HORIZON, 0), at[k])]
        if not candidates:
            return np.stack(rows)
        trial = np.repeat(rows[-1][None], len(candidates) + 1, axis=0)
        for row, (k, n) in zip(trial[1:], candidates, strict=True):
            row[k] = options[k][n]
        costs = cost(trial)
        saved = np.maximum(costs[0] - costs[1:], 1e-12)
        lost = np.array([losses[k][n] - losses[k][at[k]] for k, n in candidates])
        k, n = candidates[int(np.argmin(lost / saved))]
        at[k] = n
        rows.append(trial[1 + candidates.index((k, n))])


class Widths:
    """Structures as rows of widths, one column per group, and the channels that scores keep of them.

    Args:
        problem: The network and its limits.
        scores: Group name -> score per unit.
    """

    def __init__(self, problem: Problem, scores: Mapping[str, Scores]) -> None:
        self.problem = problem
        self._scores = scores

    def costs(self, rows: Rows, names: Collection[str] = COSTS) -> dict[str, NDArray[np.float64]]:
        """MACs, parameters and bytes of structures; MACs alone are several times as fast."""
        if set(names) == {"macs"}:
            return {"macs": self.problem.channels.costs.macs(rows).astype(float)}
        found = self.problem.channels.costs(rows)
        return {"macs": found.macs.astype(float), "params": found.params.astype(float), "memory": found.memory_bytes.astype(float)}

    def plan(self, row: Rows) -> Plan:
        """The plan that keeps the best-scored channels of a structure."""
        channels, kept = self.problem.channels, {}
        structure = channels.structure_of(row)
        for group, (_, width) in zip(channels.grouping.groups, structure.widths, strict=True):
            if width < group.size:
                kept[group.name] = select(group, self._scores[group.name], width)
        return Plan.keep(kept, channels.digest, factors=Factorization.of_axes(structure.ranks))

    def within(self, rows: Rows) -> NDArray[np.bool_]:
        """Which structures meet the budgets that can be computed."""
        good = np.ones(len(rows), dtype=bool)
        for name, found in self.costs(rows).items():
            good &= found <= self.problem.limits.get(name, np.inf)
        return good


def first_within(space: Widths, path: Rows) -> int:
    """Index of the first structure on a path that meets the budgets that can be computed.

    Raises:
        BudgetError: None does; the closest is said.
    """
    good = space.within(path)
    if good.any():
        return int(np.argmax(good))
    limits = space.problem.limits
    said = ", ".join(
        f"{name} {found[0]:,.0f} (asked: {limits[name]:,.0f})" for name, found in space.costs(path[-1:]).items() if name in limits
    )
    raise BudgetError(
        f"the budget cannot be met: the smallest legal network has {said}; "
        "widths are multiples of the target's `align`, a smaller one allows narrower layers"
    )


def give_back(space: Widths, path: Rows, first: int) -> Rows:
    """Undo notches, the latest first, as long as the budget still holds; one row."""
    current: Rows = path[first].copy()
    for index in range(first, 0, -1):
        column = int(np.argmax(path[index - 1] != path[index]))
        if path[index][column] == current[column]:
            wider = current.copy()
            wider[column] = path[index - 1][column]
            if space.within(wider[None])[0]:
                current = wider
    return current


def bisect_latency(space: Widths, path: Rows, first: int) -> int:
    """First structure on the path, from `first` on, whose measured latency is within the budget.

    Latency is guessed to fall with MACs between the two measured neighbours, which needs fewer engines
    than halving the interval.

    Raises:
        BudgetError: Even the last structure takes longer.
    """
    limit = space.problem.limits["latency"]
    macs = space.costs(path)["macs"]

    def ratio_at(index: int) -> float:
        found = space.problem.measure(space.plan(path[index])).ratio
        logger.info("notch %d of %d takes %.3f of the original, budget %.3f", index, len(path) - 1, found, limit)
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
    while high - low > 1 and not _CLOSE * limit <= high_ratio <= AIM * limit:
        wanted = 0.5 * (_CLOSE + AIM) * limit
        share = float(np.clip((low_ratio - wanted) / max(low_ratio - high_ratio, 1e-12), 0.1, 0.9))
        goal = macs[low] + share * (macs[high] - macs[low])
        middle = int(np.clip(np.searchsorted(-macs, -goal), low + 1, high - 1))
        found = ratio_at(middle)
        if found <= AIM * limit:
            high, high_ratio = middle, found
        else:
            low, low_ratio = middle, found
    return high


def fitting(space: Widths, path: Rows) -> Plan:
    """The plan on a path that meets every budget with the least taken away.

    Raises:
        BudgetError: None does; the closest is said.
    """
    first = first_within(space, path)
    if "latency" in space.problem.limits:
        return space.plan(path[bisect_latency(space, path, first)])
    return space.plan(give_back(space, path, first))
