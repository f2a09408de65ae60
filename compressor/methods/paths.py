"""Structures on a path from the whole network down, and where on it a budget is met; shared by the methods that walk one."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.passes.criteria import Scores, select
from compressor.plan import Plan

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_CLOSE = 0.97  # a measured latency from here up to the budget ends the bisection
_AIM = 0.985  # of the latency budget: what the search accepts, so that the final measurement holds too
_HORIZON = 4  # how many notches of one group are looked at together


def steepest(
    start: Sequence[int],
    options: Mapping[int, Sequence[int]],
    losses: Mapping[int, NDArray[np.float64]],
    cost: Callable[[Rows], NDArray[np.float64]],
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


def within(problem: Problem, rows: Rows) -> NDArray[np.bool_]:
    """Which structures meet the budgets that can be computed."""
    costs = problem.channels.costs(rows)
    found = {"macs": costs.macs, "params": costs.params, "memory": costs.memory_bytes}
    good = np.ones(len(rows), dtype=bool)
    for name, limit in problem.limits.items():
        if name in found:
            good &= found[name] <= limit
    return good


def first_within(problem: Problem, path: Rows) -> int:
    """Index of the first structure on a path that meets the budgets that can be computed.

    Raises:
        BudgetError: None does; the closest is said.
    """
    good = within(problem, path)
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


def give_back(problem: Problem, path: Rows, first: int) -> Rows:
    """Undo notches, the latest first, as long as the budget still holds; (groups,)."""
    current: Rows = path[first].copy()
    for index in range(first, 0, -1):
        group = int(np.argmax(path[index - 1] != path[index]))
        if path[index][group] == current[group]:
            wider = current.copy()
            wider[group] = path[index - 1][group]
            if within(problem, wider[None])[0]:
                current = wider
    return current


def bisect_latency(problem: Problem, scores: Mapping[str, Scores], path: Rows, first: int) -> int:
    """First structure on the path, from `first` on, whose measured latency is within the budget.

    Latency is guessed to fall with MACs between the two measured neighbours, which needs fewer engines
    than halving the interval.

    Raises:
        BudgetError: Even the last structure takes longer.
    """
    limit = problem.limits["latency"]
    macs = problem.channels.costs(path).macs.astype(float)

    def ratio_at(index: int) -> float:
        found = problem.measure(resolve(problem, scores, path[index])).ratio
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


def fitting(problem: Problem, scores: Mapping[str, Scores], path: Rows) -> Rows:
    """The structure of a path that meets every budget with the least taken away, (groups,).

    Raises:
        BudgetError: None does; the closest is said.
    """
    first = first_within(problem, path)
    if "latency" in problem.limits:
        return np.asarray(path[bisect_latency(problem, scores, path, first)])
    return give_back(problem, path, first)


def resolve(problem: Problem, scores: Mapping[str, Scores], row: Rows) -> Plan:
    """The plan that keeps the best-scored channels of a structure."""
    kept = {}
    for group, width in zip(problem.channels.groups, row.tolist(), strict=True):
        if width < group.size:
            kept[group.name] = select(group, scores[group.name], width)
    return Plan.keep(kept, problem.channels.digest)
