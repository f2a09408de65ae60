"""`Knapsack`: the structure of least loss within a budget, where branches may go besides widths and ranks.

Losses add up over groups, ranks and branches. What a network costs does not, since two groups meet in every layer; but once the
groups that lie in no branch (the *streams*) have their widths, each branch costs what it costs whatever the others are. So

    for each branch      combinations of its inner widths and ranks, or none of it: (cost, loss)
    over branches        a multiple-choice knapsack, solved exactly by a dynamic program over the budget in small buckets
    over streams         a local search, one stream and one step at a time, from the best of the widths on a path of channels alone

Shen et al. (HALP, 2022) and Sun et al. (MDP, 2025) solve such problems greedily or by a solver of mixed integer programs; the
split into streams and branches makes it a second's work.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compressor.methods.structures.paths import Price, Rows

_BUCKETS = 4000  # costs are rounded up to these: with 27 branches, a third of a percent of the budget is left at most, as a rule
_COMBINATIONS = 64  # of one branch
_ROUNDS = 40

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """A branch that may go.

    Attributes:
        column: Of the branch itself, 1 or 0.
        inner: Columns of the widths, ranks and branches that it holds alone.
    """

    column: int
    inner: tuple[int, ...]


@dataclass(frozen=True)
class _Choices:
    """What may become of a unit: gone, then the combinations.

    Attributes:
        columns: That of the branch, and those within.
        values: (choices, columns).
        losses: (choices,).
    """

    columns: tuple[int, ...]
    values: Rows
    losses: Floats


class Knapsack:
    """See the module.

    Args:
        start: The whole network, (columns,).
        options: Column -> its legal values, ascending; the others keep theirs.
        losses: Column -> the loss at each of these.
        units: The branches; no column is in two of them.
        cost: What is limited, of structures.
    """

    def __init__(
        self,
        start: Rows,
        options: Mapping[int, Sequence[int]],
        losses: Mapping[int, Floats],
        units: Sequence[Unit],
        cost: Price,
    ) -> None:
        self._start, self._options, self._losses, self._cost = start, options, losses, cost
        self._choices = [self._choices_of(unit) for unit in units]
        within = {column for own in self._choices for column in own.columns}
        self._streams = [column for column in options if column not in within]
        self._known: dict[tuple[tuple[int, ...], float], tuple[float, Rows]] = {}

    def solve(self, limit: float, begin: Sequence[Rows]) -> Rows | None:
        """The best structure found whose cost is at most `limit`; None where there is none.

        Args:
            limit: In units of `cost`.
            begin: Structures whose streams are tried first; the widest and the narrowest are as well.
        """
        found = [self._within(row, limit) for row in self._beginnings(begin)]
        loss, row = min(found, key=lambda own: own[0])
        for _ in range(_ROUNDS):
            tried = [self._within(own, limit) for own in self._neighbours(row)]
            best = min(tried, key=lambda own: own[0], default=(np.inf, row))
            if best[0] >= loss - 1e-12:
                break
            loss, row = best
        return row if np.isfinite(loss) else None

    @cached_property
    def cheapest(self) -> float:
        """Cost of the narrowest structure without a branch."""
        row = self._start.copy()
        for column, values in self._options.items():
            row[column] = values[0]
        return float(self._cost(row[None])[0])

    def _beginnings(self, begin: Sequence[Rows]) -> list[Rows]:
        narrow = self._start.copy()
        for column in self._streams:
            narrow[column] = self._options[column][0]
        rows = [self._start, narrow, *begin]
        distinct = {tuple(row[self._streams].tolist()): row for row in rows}
        return list(distinct.values())

    def _neighbours(self, row: Rows) -> list[Rows]:
        found = []
        for column in self._streams:
            place = self._options[column].index(int(row[column]))
            for other in (place - 2, place - 1, place + 1, place + 2):
                if 0 <= other < len(self._options[column]):
                    near = row.copy()
                    near[column] = self._options[column][other]
                    found.append(near)
        return found

    def _within(self, row: Rows, limit: float) -> tuple[float, Rows]:
        """The least loss with the streams of a row, and the structure; infinite where nothing is within the limit."""
        key = tuple(row[self._streams].tolist()), limit
        if key not in self._known:
            self._known[key] = self._fill(row, limit)
        return self._known[key]

    def _fill(self, row: Rows, limit: float) -> tuple[float, Rows]:
        base = row.copy()
        for own in self._choices:
            base[list(own.columns)] = own.values[0]  # gone
        lost = sum(float(self._losses[c][self._options[c].index(int(row[c]))]) for c in self._streams)
        trial = [base[None]]
        for own in self._choices:
            rows = np.repeat(base[None], len(own.values), axis=0)
            rows[:, list(own.columns)] = own.values
            trial.append(rows)
        costs = np.asarray(self._cost(np.concatenate(trial)), dtype=np.float64)
        left = limit - costs[0]
        if left < 0:
            return np.inf, base
        ends = np.cumsum([1, *[len(own.values) for own in self._choices]])
        more = [costs[a:b] - costs[0] for a, b in itertools.pairwise(ends)]
        picks, loss = _multiple_choice([np.maximum(own, 0.0) for own in more], [own.losses for own in self._choices], left)
        for own, pick in zip(self._choices, picks, strict=True):
            base[list(own.columns)] = own.values[pick]
        return lost + loss, base

    def _choices_of(self, unit: Unit) -> _Choices:
        inner = [column for column in unit.inner if column in self._options]
        combinations = _combinations(
            [len(self._options[column]) for column in inner], [0 in self._options[column] for column in inner]
        )
        values = [[0, *[self._options[column][-1] for column in inner]]]
        losses = [float(self._losses[unit.column][0])]
        for own in combinations:
            values.append([1, *[self._options[column][place] for column, place in zip(inner, own, strict=True)]])
            losses.append(sum(float(self._losses[column][place]) for column, place in zip(inner, own, strict=True)))
        return _Choices((unit.column, *inner), np.array(values, dtype=np.int64), np.array(losses))


def _combinations(counts: Sequence[int], branches: Sequence[bool]) -> list[tuple[int, ...]]:
    """Positions in several lists: every combination of some of each, or where the lists are many, the widths of them in step.

    Args:
        counts: Lengths of the lists.
        branches: Which of them are of a branch that is there or not.
    """
    most = max(round(_COMBINATIONS ** (1 / max(len(counts), 1))), 2)
    if most ** len(counts) <= 2 * _COMBINATIONS:
        return list(itertools.product(*[_thinned(count, most) for count in counts]))
    there = list(itertools.product((0, 1), repeat=sum(branches)))
    steps = max(_COMBINATIONS // len(there), 2)
    found = []
    for own, k in itertools.product(there, range(steps)):
        left = iter(own)
        pairs = zip(counts, branches, strict=True)
        found.append(tuple(next(left) if branch else round(k * (count - 1) / (steps - 1)) for count, branch in pairs))
    return found


def _thinned(count: int, most: int) -> list[int]:
    """At most so many positions of a list, evenly, the last always."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def _multiple_choice(costs: Sequence[Floats], losses: Sequence[Floats], budget: float) -> tuple[list[int], float]:
    """One choice of each item with the least sum of losses, and costs within a budget.

    Exact for costs rounded up to buckets, so that the budget always holds.

    Args:
        costs: Of each item's choices, >= 0; the first costs nothing.
        losses: The same.
        budget: >= 0.

    Returns:
        The choice of each item, and the loss.
    """
    size = budget / _BUCKETS
    best = np.zeros(_BUCKETS + 1)
    taken: list[NDArray[np.int64]] = []
    steps = []
    for cost, loss in zip(costs, losses, strict=True):
        step = np.ceil(cost / size - 1e-9).astype(np.int64) if size > 0 else np.where(cost > 0, _BUCKETS + 1, 0)
        table = np.full((len(cost), _BUCKETS + 1), np.inf)
        for k, own in enumerate(step.tolist()):
            if own <= _BUCKETS:
                table[k, own:] = best[: _BUCKETS + 1 - own] + loss[k]
        choice = table.argmin(axis=0)
        best = table[choice, np.arange(_BUCKETS + 1)]
        taken.append(choice)
        steps.append(step)
    picks = []
    place = _BUCKETS
    for choice, step in zip(reversed(taken), reversed(steps), strict=True):
        picks.append(int(choice[place]))
        place -= int(step[picks[-1]])
    return picks[::-1], float(best[_BUCKETS])
