"""One ranking of all channels, and where on it a budget is met: LeGR's walk, exact, and fast enough to be inside a search.

The channels with the lowest scores go first. As a network may only have legal widths, they go by notches: a notch of a
group is due by the mean score of the channels it removes (with legal widths of every size that is the score itself), and the
notches of a group come in order. Costs only fall along the walk, so that the first structure within the budget is found by
looking at a few positions at a time, on exact costs.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.methods.structures.paths import Rows, Within, give_back
from compressor.passes.criteria import Scores
from compressor.passes.labels.groups import ChannelGroup

_AT_ONCE = 24  # structures whose costs are asked together


class GlobalRanking:
    """The walk down one ranking.

    Args:
        groups: All groups of a network.
        options: For each of them its legal widths, ascending; the last is the whole group.
    """

    def __init__(self, groups: Sequence[ChannelGroup], options: Sequence[Sequence[int]]) -> None:
        self._groups = tuple(groups)
        self._full = np.array([own[-1] for own in options], dtype=np.int64)
        self._options = [np.array(own, dtype=np.int64)[::-1] for own in options]  # widest first
        self._cells = [
            [(np.asarray(cell), np.array([group.quota(cell, int(w)) for w in own])) for cell in group.cells]
            if len(own) > 1 else []
            for group, own in zip(self._groups, self._options, strict=True)
        ]  # fmt: skip

    @property
    def narrowest(self) -> Rows:
        """(1, groups): the last structure of every walk."""
        return np.array([[own[-1] for own in self._options]], dtype=np.int64)

    def walk(self, scores: Mapping[str, Scores]) -> "Walk":
        """The walk that scores give.

        Args:
            scores: Group name -> score per unit; the groups with more than one legal width must be there.
        """
        due, owner = [], []
        for k, (group, cells) in enumerate(zip(self._groups, self._cells, strict=True)):
            if cells:
                due.append(self._due(cells, scores[group.name]))
                owner.append(np.full(len(due[-1]), k))
        if not due:
            return Walk(self._full, self._options, [], 0)
        order = np.argsort(np.concatenate(due), kind="stable")
        owners = np.concatenate(owner)[order]
        return Walk(self._full, self._options, [np.flatnonzero(owners == k) for k in range(len(self._groups))], len(order))

    @staticmethod
    def _due(cells: list[tuple[NDArray[np.int64], NDArray[np.int64]]], scores: Scores) -> NDArray[np.float64]:
        """By which score each notch of a group is due."""
        removed: NDArray[np.float64] = np.zeros(1)
        count: NDArray[np.float64] = np.zeros(1)
        for units, quota in cells:
            sums = np.concatenate([[0.0], np.cumsum(-np.sort(-scores[units]))])  # of the best 0, 1, …
            removed = removed + sums[quota[:-1]] - sums[quota[1:]]
            count = count + quota[:-1] - quota[1:]
        return np.asarray(np.maximum.accumulate(removed / count), dtype=np.float64)


class Walk:
    """The structures of one walk, from the whole network down; see `GlobalRanking`."""

    def __init__(
        self, full: NDArray[np.int64], options: Sequence[NDArray[np.int64]], notches: Sequence[NDArray[np.int64]], length: int
    ) -> None:
        self._full, self._options, self._notches, self._length = full, options, notches, length

    def __len__(self) -> int:
        """How many structures there are."""
        return self._length + 1

    def rows(self, positions: NDArray[np.int64]) -> Rows:
        """(positions, groups): the structures after so many notches."""
        rows = np.repeat(self._full[None], len(positions), axis=0)
        for k, own in enumerate(self._notches):
            if len(own):
                rows[:, k] = self._options[k][np.searchsorted(own, positions)]
        return rows

    def path(self) -> Rows:
        """All structures."""
        return self.rows(np.arange(len(self)))

    def first(self, within: Within) -> Rows:
        """The first structure within a budget, (groups,).

        Raises:
            BudgetError: Not even the last is.
        """
        return np.asarray(self.rows(np.array([bisected(self.rows, len(self), within)]))[0])

    def filled(self, within: Within) -> Rows:
        """The first structure within a budget, with those notches undone, the latest first, that it still allows; (groups,).

        Raises:
            BudgetError: Not even the last is.
        """
        first = bisected(self.rows, len(self), within)
        return give_back(self.rows(np.arange(first + 1)), first, within)


def bisected(rows: Callable[[NDArray[np.int64]], Rows], count: int, within: Within) -> int:
    """The position of the first of some structures, each narrower than the one before, that is within a budget.

    Args:
        rows: From positions, the structures there.
        count: How many there are.
        within: Which of some structures are; once one is, all narrower ones are taken to be.

    Raises:
        BudgetError: Not even the last is.
    """
    low, high = -1, count - 1  # low is not within, high is
    if not within(rows(np.array([high])))[0]:
        raise BudgetError("the budget cannot be met: not even the narrowest legal network is within it")
    while high - low > 1:
        positions = np.unique(np.linspace(low + 1, high - 1, min(_AT_ONCE, high - low - 1)).round().astype(np.int64))
        good = within(rows(positions))
        found = int(np.argmax(good)) if good.any() else len(positions)
        high = int(positions[found]) if found < len(positions) else high
        low = int(positions[found - 1]) if found > 0 else low
    return high
