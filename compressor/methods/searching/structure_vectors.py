"""`Vectors`: structure vectors as levels, the number of each group's width among its legal ones, and as parameters of a study."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution

from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import Walk, bisected
from compressor.methods.structures.paths import Rows, distinct, through

_BETWEEN = 16  # structures on the way from the whole network to the best, and from there to the narrowest


class Vectors:
    """Structure vectors of one network; see the module.

    Args:
        names: Of the groups.
        options: Legal widths of each, ascending.
        affordable: What is within the limits.
        fill: Whether steps that a repaired vector still affords are given back, to groups drawn at random.

    Raises:
        BudgetError: Not even the narrowest is within the limits.
    """

    def __init__(self, names: list[str], options: list[tuple[int, ...]], affordable: Affordable, fill: bool) -> None:
        self._options = [np.array(own, dtype=np.int64) for own in options]
        self._names = names
        self._top = np.array([len(own) - 1 for own in options], dtype=np.int64)
        self._affordable, self._fill = affordable, fill
        affordable.check(self.rows(np.zeros((1, len(names)), dtype=np.int64)))

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """Widths where they are multiples of a step; otherwise their numbers."""
        found: dict[str, BaseDistribution] = {}
        for name, own in zip(self._names, self._options, strict=True):
            if len(own) > 1 and self._even(own):
                step = int(own[0])
                found[f"width:{name}"] = IntDistribution(step, int(own[-1]), step=step)
            elif len(own) > 1:
                found[f"level:{name}"] = IntDistribution(0, len(own) - 1)
        return found

    @property
    def learning(self) -> bool:
        """Whether what is within the limits changes, as a latency model learns."""
        return self._affordable.model is not None

    def allowed(self, candidates: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
        """Which candidates are within the limits."""
        return self.within(self.rows(np.stack([self.levels(params) for params in candidates])))

    def within(self, rows: Rows) -> NDArray[np.bool_]:
        """Which structures are within the limits."""
        return self._affordable.within(rows)

    def allocations(self, walks: Sequence[Walk]) -> list[Rows]:
        """Where some walks end within the limits."""
        return [walk.filled(self.within) for walk in walks]

    def near(self, widths: Rows, random: np.random.Generator, noise: float) -> NDArray[np.int64]:
        """Levels of a structure, (groups,), multiplied by noise: what is narrow can spare less than what is wide."""
        moved = self._levels_of(widths) * np.exp(random.normal(0.0, 1.0, len(widths)) * noise)
        return np.clip(np.round(moved).astype(np.int64), 0, self._top)

    def _levels_of(self, widths: Rows) -> NDArray[np.int64]:
        return np.array([int(np.searchsorted(own, w)) for own, w in zip(self._options, widths, strict=True)], dtype=np.int64)

    @staticmethod
    def _even(own: NDArray[np.int64]) -> bool:
        return bool((own == own[0] * np.arange(1, len(own) + 1)).all())

    def levels(self, params: Mapping[str, Any]) -> NDArray[np.int64]:
        """(groups,) from parameters."""
        found = self._top.copy()
        for k, (name, own) in enumerate(zip(self._names, self._options, strict=True)):
            if f"width:{name}" in params:
                found[k] = int(np.searchsorted(own, params[f"width:{name}"]))
            elif f"level:{name}" in params:
                found[k] = params[f"level:{name}"]
        return found

    def params(self, levels: NDArray[np.int64]) -> dict[str, Any]:
        """Parameters from (groups,)."""
        found: dict[str, Any] = {}
        for k, (name, own) in enumerate(zip(self._names, self._options, strict=True)):
            if len(own) > 1:
                even = self._even(own)
                found[f"{'width' if even else 'level'}:{name}"] = int(own[levels[k]] if even else levels[k])
        return found

    def rows(self, levels: NDArray[np.int64]) -> Rows:
        """(structures, groups): widths from levels."""
        return np.stack([own[levels[:, k]] for k, own in enumerate(self._options)], axis=1)

    def repaired(self, levels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Steps taken from groups drawn at random, as many as it needs, others given if asked; (groups,) from (groups,).

        The draws are made first and the place where they suffice is bisected, which gives what checking after each gives.
        """
        taken = levels if self._affordable.within(self.rows(levels[None]))[0] else self._taken(levels, random)
        return self._given(taken, random) if self._fill else taken

    def _taken(self, levels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        left, order = levels.copy(), []
        alive = [k for k in range(len(levels)) if levels[k] > 0]
        for _ in range(int(levels.sum())):
            k = alive[int(random.integers(len(alive)))]
            order.append(k)
            left[k] -= 1
            if left[k] == 0:
                alive.remove(k)
        return self._first(levels - self._drawn(order))

    def _given(self, levels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Steps given to groups drawn at random, until none more fits."""
        order = random.permutation(np.repeat(np.arange(len(levels)), self._top - levels))
        found = self._first((levels + self._drawn(order))[::-1])
        while True:
            able = np.flatnonzero(found < self._top)
            wider = found + np.eye(len(found), dtype=np.int64)[able]
            able = able[self._affordable.within(self.rows(wider))] if len(able) else able
            if not len(able):
                return found
            found = found + np.eye(len(found), dtype=np.int64)[random.choice(able)]

    def _drawn(self, order: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """(draws + 1, groups): how often each group is among the first so many draws."""
        counts = np.zeros((len(order) + 1, len(self._top)), dtype=np.int64)
        counts[np.arange(1, len(order) + 1), order] = 1
        return np.cumsum(counts, axis=0)

    def _first(self, path: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first of some levels, each narrower than the one before, that is within the budget."""
        return np.asarray(path[bisected(lambda at: self.rows(path[at]), len(path), self._affordable.within)])

    def around(self, widths: Rows, walks: Sequence[Walk]) -> Rows:
        """Structures from the whole network down through a given one, (groups,), to the narrowest.

        Channels go in the order of the first walk, which tells what costs least; without one, from all groups in proportion.
        """
        if walks:
            return through(walks[0].path(), widths)
        levels = self._levels_of(widths)
        wider = [levels + np.round((self._top - levels) * (1 - k / _BETWEEN)).astype(np.int64) for k in range(_BETWEEN)]
        narrower = [np.floor(levels * (1 - k / _BETWEEN)).astype(np.int64) for k in range(_BETWEEN + 1)]
        return distinct(self.rows(np.stack([*wider, *narrower])))
