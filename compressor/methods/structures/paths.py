"""Structures on a path from the whole network down, and where on it a budget is met; shared by the methods that walk one."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BackendError, BudgetError
from compressor.methods.base import Problem
from compressor.passes.criteria import Scores, select
from compressor.values.plan import Factorization, Plan

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]
Price = Callable[[Rows], NDArray[np.float64]]
"""Of structures, (structures, groups) to (structures,): what is to be saved."""
Within = Callable[[Rows], NDArray[np.bool_]]
"""Of structures, (structures, groups) to (structures,): whether they meet a budget."""

COSTS = ("macs", "params", "memory")
CLOSE = 0.97  # a measured latency from here up to the budget ends the bisection
AIM = 0.985  # of the latency budget: what the search accepts, so that the final measurement holds too
_FILLS = 3  # engines that are built to use what a notch has left of a latency budget
_AT_ONCE = 64  # notches that are given back with one look at the costs
_HORIZON = 4  # how many notches of one group are looked at together


def steepest(
    start: Sequence[int],
    options: Mapping[int, Sequence[int]],
    losses: Mapping[int, NDArray[np.float64]],
    cost: Price,
    holds: Mapping[int, Sequence[int]] | None = None,
) -> Rows:
    """The path on which every notch costs the least loss for what it saves.

    Args:
        start: Width of every group.
        options: Group index -> its legal widths, ascending.
        losses: Group index -> the loss at each of these.
        cost: Of structures; what a notch saves is counted on the structure it is taken from.
        holds: Index of a branch -> indices of what is in it alone: once the branch is gone, what that had lost no longer counts.

    Returns:
        (structures, groups), from `start` to the narrowest.
    """
    rows = [np.array(start, dtype=np.int64)]
    at = {k: len(widths) - 1 for k, widths in options.items()}
    held = {k: [own for own in inner if own in options] for k, inner in (holds or {}).items() if k in options}
    while True:
        gone = {own for k, inner in held.items() if at[k] == 0 for own in inner}
        notches = [(k, n) for k in options for n in range(max(at[k] - _HORIZON, 0), at[k])]
        candidates = [own for own in notches if own[0] not in gone] or notches  # what is gone comes last: all have their place
        if not candidates:
            return np.stack(rows)
        trial = np.repeat(rows[-1][None], len(candidates) + 1, axis=0)
        for row, (k, n) in zip(trial[1:], candidates, strict=True):
            row[k] = options[k][n]
        costs = cost(trial)
        saved = np.maximum(costs[0] - costs[1:], 1e-12)
        spared = {k: sum(float(losses[own][at[own]]) for own in inner) for k, inner in held.items()}
        lost = np.array([losses[k][n] - losses[k][at[k]] - spared.get(k, 0.0) for k, n in candidates])
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
        return Plan.keep(kept, channels.digest, factors=Factorization.of_axes(structure.ranks), removed=structure.removed)

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
    raise BudgetError(f"the budget cannot be met: the smallest legal network has {said}{_advice(space.problem.target.align)}")


def _advice(align: int) -> str:
    return f"; widths are multiples of the target's `align` ({align}), a smaller one allows narrower layers" if align > 1 else ""


def give_back(path: Rows, first: int, within: Within) -> Rows:
    """A structure of a path with those notches undone, the latest first, that a budget still allows; one row.

    Args:
        path: (structures, groups).
        first: The structure's position.
        within: Which of some structures are within the budget; costs grow with every width.
    """
    current: Rows = path[first].copy()
    found = zip(*np.nonzero(path[:first] != path[1 : first + 1]), strict=True)
    left = [(int(before), int(column)) for before, column in found][::-1]  # notches: the position before, the group
    while left:
        following = {column: before for before, column in reversed(left)}  # the next notch of each group
        alone = np.repeat(current[None], len(following), axis=0)
        for row, (column, before) in zip(alone, following.items(), strict=True):
            row[column] = path[before, column]
        run = left[:_AT_ONCE]  # the latest notches, one after the other
        together = np.repeat(current[None], len(run), axis=0)
        for k, (before, column) in enumerate(run):
            together[k:, column] = path[before, column]
        good = within(np.concatenate([alone, together]))
        closed = {column for column, fits in zip(following, good, strict=False) if not fits}
        fit = good[len(following) :]
        count = len(run) if fit.all() else int(np.argmin(fit))
        if count:
            current = together[count - 1]
        if count < len(run):
            closed.add(run[count][1])
        left = [(before, column) for before, column in left[count:] if column not in closed]
    return current


def distinct(path: Rows) -> Rows:
    """A path without structures that are the same as the one before."""
    return np.asarray(path[np.concatenate([[True], (np.diff(path, axis=0) != 0).any(axis=1)])])


def through(path: Rows, row: Rows) -> Rows:
    """A path bent so that it passes through a structure: what is wider goes in the path's order, then what is left.

    Args:
        path: (structures, groups), from the whole network to the narrowest.
        row: (groups,).
    """
    return distinct(np.concatenate([np.maximum(path, row), np.minimum(path, row)]))


def fitting(
    space: Widths, path: Rows, price: Price | None = None, fill: bool = True, known: Mapping[tuple[int, ...], float] | None = None
) -> Plan:
    """The plan on a path that meets every budget with the least taken away.

    Args:
        space: Of the structures.
        path: (structures, groups), from the whole network down.
        price: What a latency is guessed to fall with between measured structures; MACs by default.
        fill: Whether notches before it that the budget still allows are undone.
        known: Structures that were measured before, and their shares of the original's latency.

    Raises:
        BudgetError: None does; the closest is said.
        BackendError: Not even the engine of the narrowest can be built.
    """
    first = first_within(space, path)
    if "latency" not in space.problem.limits:
        return space.plan(give_back(path, first, space.within) if fill else path[first])
    price = price or (lambda rows: space.costs(rows, ("macs",))["macs"])
    return space.plan(_Measured(space, path, price, fill, known or {}).fitting(first))


class _Measured:
    """A path whose structures are built and measured, few of them."""

    def __init__(self, space: Widths, path: Rows, price: Price, fill: bool, known: Mapping[tuple[int, ...], float]) -> None:
        self._space, self._path, self._price, self._fill, self._known = space, path, price, fill, known
        self._limit = space.problem.limits["latency"]
        self._aim = 0.5 * (CLOSE + AIM) * self._limit
        self._error: BackendError | None = None

    def fitting(self, first: int) -> Rows:
        """The structure within the budget, from position `first` on, with the least taken away.

        Raises:
            BudgetError: Even the last structure takes longer.
        """
        low, low_ratio = first, self._ratio(self._path[first]) if first > 0 else 1.0  # infinite: no engine, so look further down
        price = np.minimum.accumulate(self._price(self._path))
        if low_ratio <= self._limit * (AIM if first > 0 else 1.0):  # what can be computed asks for more than the latency does
            if not self._fill or self._close(low_ratio):
                return np.asarray(self._path[first])
            return self._filled(first, low_ratio, (1.0 - low_ratio) / max(float(price[0] - price[first]), 1e-12))
        high = len(self._path) - 1
        high_ratio = self._ratio(self._path[high])
        if np.isinf(high_ratio):
            raise BackendError(f"not even the engine of the smallest legal network can be built: {self._error}") from self._error
        if high_ratio > self._limit:
            raise BudgetError(
                f"the latency budget cannot be met: the smallest legal network takes {high_ratio:.3f} of the original's "
                f"latency, asked for is {self._limit:.3f}{_advice(self._space.problem.target.align)}"
            )
        while high - low > 1 and not self._close(high_ratio):
            # between its measured neighbours latency is guessed to fall with the price: fewer engines than by halves
            share = 0.5
            if np.isfinite(low_ratio):
                share = float(np.clip((low_ratio - self._aim) / max(low_ratio - high_ratio, 1e-12), 0.1, 0.9))
            goal = price[low] + share * (price[high] - price[low])
            middle = int(np.clip(np.searchsorted(-price, -goal), low + 1, high - 1))
            found = self._ratio(self._path[middle])
            if found <= AIM * self._limit:
                high, high_ratio = middle, found
            else:
                low, low_ratio = middle, found
        if self._close(high_ratio) or not self._fill or np.isinf(low_ratio):
            return np.asarray(self._path[high])
        return self._filled(high, high_ratio, (low_ratio - high_ratio) / max(float(price[low] - price[high]), 1e-12))

    def _filled(self, high: int, high_ratio: float, slope: float) -> Rows:
        """The structure at `high` with notches undone up to the limit: one notch may take more than was asked for."""
        start = best = np.asarray(self._path[high])
        best_ratio, anchor = high_ratio, float(self._price(start[None])[0])
        seen = {tuple(start)}
        for _ in range(_FILLS):

            def within(rows: Rows, slope: float = slope) -> NDArray[np.bool_]:
                guessed = high_ratio + slope * (self._price(rows) - anchor)
                return np.asarray(self._space.within(rows) & (guessed <= self._aim), dtype=bool)

            row = give_back(self._path, high, within)
            if tuple(row) in seen:
                break
            seen.add(tuple(row))
            found = self._ratio(row)
            if best_ratio < found <= AIM * self._limit:
                best, best_ratio = row, found
            slope = (found - high_ratio) / max(float(self._price(row[None])[0]) - anchor, 1e-12)
            if slope <= 0 or self._close(found):
                break
        return best

    def _close(self, ratio: float) -> bool:
        return CLOSE * self._limit <= ratio <= AIM * self._limit

    def _ratio(self, row: Rows) -> float:
        """Of the original's latency; infinite where no engine can be built."""
        if tuple(row) in self._known:
            return self._known[tuple(row)]
        try:
            found = self._space.problem.measure(self._space.plan(row)).ratio
        except BackendError as error:
            logger.warning("left out, its engine cannot be built: %s", error)
            self._error = error
            return float("inf")
        logger.info("%.3g of the price: %.3f of the original's latency, budget %.3f", self._price(row[None])[0], found, self._limit)
        return found
