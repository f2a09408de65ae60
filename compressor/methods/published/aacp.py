"""AACP: a structure vector under several budgets at once, as published (Lin et al., ICPR 2022; released code `linlb11/AACP`).

**The structure vector** C = (c_1 … c_D) says how many channels each group keeps, in steps s_l of an eighth of the group:
c_l in {s_l, 2 s_l, …}. Residual streams are left alone. Wanted is the C of the highest PSAE within the budgets.

**PSAE**, the accuracy of a structure without training (`Fitness("recalibrate", objective="metric")`): each group keeps the
c_l filters with the largest L1 norm; batch norms are reset and recalibrated on training images; the accuracy on a hold-out.

**Improved differential evolution** (`search/samplers/aacp.py`), NP = 10, T = 200 generations, F = 0.5, CR = 0.8, max_stay = 4:

    first population: uniform; while a budget is exceeded, one step less in a group drawn at random           (repair)
    best = the best of it
    each generation, each member x_i in its turn:
        not improved for max_stay turns:  x_i is drawn anew
        v = best + F (x_r2 - x_r3), rounded to the steps            r2, r3 drawn, not i
        u_l = v_l with probability CR, in one place surely, else x_i,l;  u is repaired
        PSAE(u) > PSAE(x_i): u takes its place; it is the best where it is better than that

Where this differs from the released code:

* residual streams are left alone in a MobileNetV2 too (there, outputs of its blocks are searched), every group has a width of
  its own (there, both inner ones of a ResNet-50's bottleneck have one), in eighths (there, 8, 16 and 32 for a VGG-16);
* channels that a depthwise layer scales are ranked by the sum of its norm and its producer's, each over its layer's mean (there:
  by the producer's);
* limits are of costs (there: of MACs and of the number of channels); `trials` count restarts too (there: 10 + 2,000 + restarts);
* a vector that exceeds a budget is always repaired (there, drawn anew for VGG and ResNet-50), after the crossover alone, and the
  first best is that of the whole population (there: its first member);
* candidates are judged on 1,000 images held out of the training data (there: on the test set), on fixed images without
  augmentation, and statistics are those of 500 images, cumulative (there: a momentum of 0.1 over 101 batches of 64).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from compressor.methods.base import Problem
from compressor.methods.searching.final_plan import accepted, row_of, select_measured
from compressor.methods.searching.loss_ranking import singular_values
from compressor.methods.searching.search_study import Quest, SearchingMethod, search
from compressor.methods.searching.structure_vectors import Vectors
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import Walk
from compressor.methods.structures.paths import Rows, Widths
from compressor.methods.structures.searched_widths import options_of
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.search_space import depth_of, ranks_of
from compressor.passes.criteria import CRITERIA, Scores, Scoring
from compressor.passes.fitting.settings import Compensation
from compressor.search.fitness import Fitness
from compressor.search.samplers import AACPSampler
from compressor.values.plan import Plan


@dataclass(frozen=True)
class PublishedAACP(SearchingMethod):
    """Search a structure vector under budgets.

    Attributes, besides those of `SearchingMethod`:
        population: NP.

    Raises:
        BudgetError: A setting is out of range.
    """

    name: ClassVar[str] = "aacp"
    of_paper: ClassVar[bool] = True
    trials: int = 2010  # NP + T NP
    fitness: Fitness = field(default_factory=lambda: Fitness("recalibrate", objective="metric"))
    sampler: str = "aacp"
    compensation: Compensation | None = None
    population: int = 10

    fills: ClassVar[bool] = False
    """Whether steps that a repaired candidate still affords are given back, and a result that leaves latency is widened."""

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: The budget cannot be met.
            DataError: Data are missing.
        """
        problem = self.spaced(problem)
        self.check(problem)
        options = self.options(problem)
        affordable = Affordable(problem, options, self.engines)
        space = Widths(problem, self.scores(problem, options, affordable))
        vectors = Vectors([group.name for group in problem.channels.groups], options, affordable, self.fills)
        walks = self.walks(problem, options, affordable)

        def row(params: Mapping[str, Any], index: int) -> Rows:
            levels = vectors.repaired(vectors.levels(params), np.random.default_rng([problem.seed, index, 1]))
            return np.asarray(vectors.rows(levels[None])[0])

        def path(trial: FrozenTrial) -> Rows:
            return vectors.around(row_of(trial), walks)

        quest = Quest(vectors.space, self.evolution(problem.seed, vectors, walks), row, lambda params: space)
        found = search(problem, self, quest, affordable)
        best, plan = select_measured(affordable, found, lambda _: space, path, self.fills, widen=self.fills)
        return accepted(affordable, plan, space, path(best), self.fills, self.accept)

    def check(self, problem: Problem) -> None:
        """Raise `DataError` where data are missing, before anything is measured."""

    def options(self, problem: Problem) -> list[tuple[int, ...]]:
        """The steps of every group, ascending: eighths; of groups that are left alone, the whole."""
        return options_of(problem, "eighths", self.searched(problem) & _inside(problem.channels))

    def scores(self, problem: Problem, options: list[tuple[int, ...]], affordable: Affordable) -> dict[str, Scores]:
        """Which channels a group keeps: those of the largest L1 norm."""
        del options, affordable
        channels = problem.channels
        scoring, criterion, names = Scoring(channels), CRITERIA["l1"](aggregate="sum"), _inside(channels)
        free = [group for group in channels.free if group.name in names]
        return {**{group.name: criterion(scoring, group) for group in free}, **singular_values(channels)}

    def walks(self, problem: Problem, options: list[tuple[int, ...]], affordable: Affordable) -> list[Walk]:
        """Walks from the whole network down that are known to be good; none."""
        del problem, options, affordable
        return []

    def evolution(self, seed: int, vectors: Vectors, walks: list[Walk], **more: Any) -> BaseSampler:
        """The improved differential evolution."""
        del walks

        def repair(params: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
            return vectors.params(vectors.repaired(vectors.levels(params), random))

        allowed = vectors.allowed if vectors.learning else None
        return self.own_sampler(seed, repair=repair, space=vectors.space, allowed=allowed, **more)

    def own_sampler(self, seed: int, **more: Any) -> BaseSampler:
        """The same by its settings, for whatever space."""
        return AACPSampler(seed, self.population, lag=self.parallel, **more)


def is_stream(channels: ChannelGraph, name: str) -> bool:
    """Whether several layers that mix channels make a group: the channels of a residual stream."""
    group = next(group for group in channels.groups if group.name == name)
    modules = dict(channels.graph.named_modules())
    makers = [modules[layer] for layer in group.layers if layer in modules]
    return len([maker for maker in makers if getattr(maker, "groups", 1) == 1]) > 1


def _inside(channels: ChannelGraph) -> frozenset[str]:
    """Names of what is searched: free groups that are no streams, ranks, and branches."""
    free = {group.name for group in channels.free if not is_stream(channels, group.name)}
    return frozenset(free | {axis.name for axis in (*ranks_of(channels), *depth_of(channels))})
