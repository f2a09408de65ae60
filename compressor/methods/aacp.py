"""`AACP`: a structure vector under several budgets at once, found by an improved differential evolution without training.

Lin et al., ICPR 2022. A candidate says how many channels each group keeps, in steps; it keeps the filters with the
largest L1 norm, has its batch norms reset and recalibrated on fixed batches, and is judged by its accuracy (PSAE); the
vectors evolve (`AACPSampler`), and what exceeds a budget is repaired by taking steps from groups drawn at random, the
first population too: nothing is rejected.

`AACP.published()` is the search of the released code with its constants. What goes beyond it, each an option:

* `steps="staircase"`: the steps are the measured ones of each group on the target, not an eighth of the group;
* `fitness`: layers are compensated in closed form before a candidate is judged, or the loss is looked at;
* `ranking="loss"`: the order of channels within a group is that of compensation, and a share of the first population (`near`)
  is `CaP`'s allocations by loss curves, some with noise (`genomes.py`), as are members that are drawn anew;
* `streams="group"`: residual streams are pruned too; the released code leaves them alone in ResNets;
* budgets of any kind at once, latency by a model that learns from measured leaders.

Where this differs from the released code: `streams="inside"` leaves all residual streams alone, also those of a MobileNetV2,
whose block outputs are searched there; every group has a width of its own (there, both inner ones of a ResNet-50's bottleneck
have one) in eighths (there, steps of 8, 16 and 32 for a VGG-16); channels that a depthwise layer scales are ranked by the sum of
its norm and its producer's (there: by the producer's); limits are of costs (there: of MACs and of the number of channels). Trials
are 400 by default, as LeGR's, 2,010 there (`AACP.published()`); candidates are judged on 1,000 images held out of the training
data (there: on the test set), on fixed images without augmentation, and statistics are those of 500 images, cumulative (there: a
momentum of 0.1 over 101 batches of 64); `Fitness(holdout=, images=)` takes others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.losses.streams import is_stream
from compressor.methods.searching.genomes import SENSITIVITIES, LossRanking, images_for_losses, singular_values
from compressor.methods.searching.selection import accepted, row_of, select_measured
from compressor.methods.searching.trials import Quest, SearchingMethod, search
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import GlobalRanking, Walk, bisected
from compressor.methods.structures.paths import Rows, Widths, distinct, through
from compressor.methods.structures.steps import Steps, options_of
from compressor.passes.channels.rank_axes import axes_of
from compressor.passes.criteria import CRITERIA, Scores, Scoring
from compressor.passes.fitting.losses import rankable
from compressor.passes.fitting.settings import Compensation
from compressor.search.fitness import Fitness
from compressor.search.samplers import AACPSampler
from compressor.values.plan import Plan

_NOISE = 0.2  # standard deviation of the logarithm of levels around an allocation's
_BETWEEN = 16  # structures on the way from the whole network to the best, and from there to the narrowest


@dataclass(frozen=True)
class AACP(SearchingMethod):
    """Search a structure vector under budgets.

    Attributes, besides those of `SearchingMethod`:
        steps: Widths that are searched: of the measured `staircase`, `eighths` of the group, or of the target's `align`.
        ranking: Which channels a group keeps: those with the largest `l1` norm, or by the `loss` after compensation.
        streams: Whether residual streams are pruned as a `group`, or left alone (`inside`).
        fill: Whether steps that a repaired candidate still affords are given back to groups drawn at random, and the result is
            widened where it is measured to leave some of a latency. Not as published.
        near: Share of the first population that lies around `CaP`'s allocations, where `ranking` is by loss; the others are drawn.
        population: See `AACPSampler`.
        factor: See there.
        crossover: See there.
        max_stay: See there.

    Raises:
        BudgetError: A setting is out of range.
    """

    sampler: str = "aacp"
    steps: Steps = "staircase"
    ranking: Literal["l1", "loss"] = "loss"
    streams: Literal["group", "inside"] = "group"
    fill: bool = True
    near: float = 0.5
    population: int = 10
    factor: float = 0.5
    crossover: float = 0.8
    max_stay: int = 4

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not 0 <= self.near <= 1:
            raise BudgetError(f"AACP(near={self.near}): a share of the first population, from 0 to 1")
        try:
            AACPSampler(0, self.population, self.factor, self.crossover, self.max_stay)
        except ValueError as error:
            raise BudgetError(str(error)) from error

    @classmethod
    def published(cls, trials: int = 2010) -> "AACP":
        """As in the released code: eighths, L1, accuracy after recalibration, streams left alone.

        Args:
            trials: Evaluations; NP + T NP = 2010 with those of the first population.
        """
        fitness = Fitness("recalibrate", objective="accuracy")
        return cls(trials, fitness, compensation=None, steps="eighths", ranking="l1", streams="inside", fill=False, distinct=False)

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: The budget cannot be met.
            DataError: Data are missing.
        """
        problem = self.spaced(problem)
        if self.ranking == "loss":
            images_for_losses(problem)  # or an error, before anything is measured
        options = options_of(problem, self.steps, self._groups(problem))
        affordable = Affordable(problem, options, self.engines)
        scores = self._scores(problem, options, affordable)
        vectors = _Vectors([g.name for g in problem.channels.groups], options, affordable, self.fill)
        walks = self._walks(problem, options, affordable)
        start = self._start(problem.seed, walks, vectors)
        own = {"aacp": lambda: self._sampler(problem.seed, vectors, start, walks)}
        space = Widths(problem, scores)

        def row(params: Mapping[str, Any], index: int) -> Rows:
            levels = vectors.repaired(vectors.levels(params), np.random.default_rng([problem.seed, index, 1]))
            return np.asarray(vectors.rows(levels[None])[0])

        quest = Quest(vectors.space, own, row, lambda params: space)
        found = search(problem, self, quest, affordable)

        def path(trial: FrozenTrial) -> Rows:
            return vectors.around(row_of(trial), walks)

        best, plan = select_measured(affordable, found, lambda _: space, path, self.fill, widen=self.fill)
        return accepted(affordable, plan, space, path(best), self.fill, self.accept)

    @property
    def _count(self) -> int:
        return int(self.near * self.population)

    def _groups(self, problem: Problem) -> frozenset[str]:
        """Names of what is searched."""
        channels = problem.channels
        able = rankable(channels)[0] if self.ranking == "loss" else {group.name for group in channels.free}
        names = {name for name in able if self.streams == "group" or not is_stream(channels, name)}
        return frozenset(names | {axis.name for axis in axes_of(channels)})

    def _scores(self, problem: Problem, options: Sequence[Sequence[int]], affordable: Affordable) -> dict[str, Scores]:
        channels = problem.channels
        if self.ranking == "l1":
            scoring, criterion, names = Scoring(channels), CRITERIA["l1"](aggregate="sum"), self._groups(problem)
            free = [group for group in channels.free if group.name in names]
            return {**{group.name: criterion(scoring, group) for group in free}, **singular_values(channels)}
        return self._by_loss(problem, options, affordable)

    def _by_loss(
        self, problem: Problem, options: Sequence[Sequence[int]], affordable: Affordable, power: float = SENSITIVITIES[0]
    ) -> dict[str, Scores]:
        settings = self.compensation or Compensation()
        return LossRanking(problem, settings, options, affordable.price, power, self.probes).plain

    def _walks(self, problem: Problem, options: Sequence[Sequence[int]], affordable: Affordable) -> list[Walk]:
        """The walks on which `CaP`'s allocations lie."""
        if self.ranking != "loss":
            return []
        ranking = GlobalRanking(problem.channels.groups, options)
        return [ranking.walk(self._by_loss(problem, options, affordable, power)) for power in SENSITIVITIES[: self._count]]

    def _start(self, seed: int, walks: Sequence[Walk], vectors: "_Vectors") -> list[dict[str, Any]]:
        """Members of the first population: the allocations, and these with noise."""
        allocations, random = vectors.allocations(walks), np.random.default_rng([seed, 2])
        count = self._count if allocations else 0
        near = [vectors.near(allocations[k % len(allocations)], random, _NOISE * (k >= len(allocations))) for k in range(count)]
        return [vectors.params(levels) for levels in near]

    def _sampler(self, seed: int, vectors: "_Vectors", start: list[dict[str, Any]], walks: Sequence[Walk]) -> BaseSampler:
        def repair(params: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
            return vectors.params(vectors.repaired(vectors.levels(params), random))

        def fresh(random: np.random.Generator) -> dict[str, Any]:
            allocations = vectors.allocations(walks)  # by the latency model as it is now
            return vectors.params(vectors.near(allocations[random.integers(len(allocations))], random, _NOISE))

        own = (self.population, self.factor, self.crossover, self.max_stay, repair, start, self.parallel, vectors.space)
        return AACPSampler(seed, *own, vectors.allowed if vectors.learning else None, fresh if start else None)


class _Vectors:
    """Structure vectors as levels, the number of each group's width among its legal ones, and as parameters of a study."""

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
