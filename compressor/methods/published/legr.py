"""LeGR: one learnt global ranking of all channels, as published (Chin et al., CVPR 2020; released code `cmu-enyac/LeGR`).

**The ranking.** The importance of filter i of layer l(i), comparable across layers, is

    I_i = α_l(i) ||Θ_i||² + κ_l(i)                                                        (`NormRanking`)

and the filters with the lowest go, of whichever layer, until MACs < ζ (`GlobalRanking`, the walk). Filters that are tied, by an
addition or a depthwise layer, have one importance, the sum of theirs. A share s = 0.1 of every group stays, at least 2 channels.

**Learning α and κ** by regularised evolution at the tightest budget (`search/samplers/legr.py`), σ_l the standard deviation of
{||Θ_i||²} in layer l; the lowest fitness wins:

    for i in 0 … E-1:                                               E = 400 evaluations
        i < P-1:     α_l = exp(N(0, σ)),  κ_l = N(0, σ_l)           P = 64, σ = 1
        i = P-1:     α = 1, κ = 0                                   the identity
        otherwise:   parent = best of S drawn from the latest P     S = 16
                     in u L layers drawn anew (u = 0.1):            α_l *= exp(N(0, σ step)),  κ_l += N(0, σ_l)
                                                                    step = max(1 - i / 1.25 E, 0.2)
        fitness(i) = mean cross-entropy of the network pruned to ζ, after τ steps of training (0 for the paper's Table 1)

**Every other budget** is met by walking the learnt ranking less far: one search, a family of networks.

Where this differs from the released code:

* a walk stops on multiples of the target's `align` (there, after any filter), a notch being due by the mean of its scores;
* a quota holds for a group, not for a layer (there, an exhausted layer's shortcut ends misaligned);
* candidates are judged on 1,000 images held out of the training data (there, on 5,000 that are trained on as well);
* a branch, where these may go, is one unit: with the squared norms of all its weights;
* α and κ end four units from the middle (four σ, four σ_l); budgets are of any cost, ranks may be ranked beside filters;
* batch norms of the result are recalibrated, before any training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from torch import nn

from compressor.methods.base import Problem
from compressor.methods.searching.final_plan import accepted, row_of, select_measured
from compressor.methods.searching.loss_ranking import Genome, singular_values
from compressor.methods.searching.search_study import Quest, SearchingMethod, search
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.paths import Rows, Widths, fitting, through
from compressor.methods.structures.searched_widths import above_quota, options_of
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.branches import Branch
from compressor.passes.channels.search_space import depth_of
from compressor.passes.criteria import Scores, Scoring
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.product import Conv
from compressor.search.fitness import Fitness
from compressor.search.samplers import LeGRSampler
from compressor.values.plan import Plan

_SAMPLES = 1 / 4  # S / P
_QUOTA = 0.1  # s: the share of a group that stays


@dataclass(frozen=True)
class PublishedLeGR(SearchingMethod):
    """Learn a global ranking by norms, and prune by it to one or several budgets.

    Attributes, besides those of `SearchingMethod`:
        population: P.
    """

    name: ClassVar[str] = "legr"
    of_paper: ClassVar[bool] = True
    fitness: Fitness = field(default_factory=lambda: Fitness("none"))
    sampler: str = "legr"
    compensation: Compensation | None = None
    population: int | None = 64

    fills: ClassVar[bool] = False
    """Whether notches that the budget still allows where the walk stops are undone, the latest first."""

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: The budget cannot be met.
            DataError: Data are missing.
        """
        return self.plans([problem])[0]

    def plans(self, problems: Sequence[Problem]) -> list[Plan]:
        """One search, at the tightest budget, and the plans of all budgets by its ranking.

        Args:
            problems: The same but for their limits.

        Raises:
            BudgetError: A budget cannot be met.
            DataError: Data are missing.
        """
        problems = [self.spaced(problem) for problem in problems]
        tightest = min(problems, key=lambda p: sorted(p.limits.items()))
        self.check(tightest)
        groups = tightest.channels.groups
        legal = [above_quota(g, own, tightest.target.align, _QUOTA) for g, own in zip(groups, self.widths(tightest), strict=True)]
        affordable = Affordable(tightest, legal, self.engines)
        genome = self.genome(tightest, legal, affordable)
        options = [own if group.name in genome.groups else (group.size,) for group, own in zip(groups, legal, strict=True)]
        ranking = GlobalRanking(groups, options)
        affordable.check(ranking.narrowest)

        def row(params: Mapping[str, Any], index: int) -> Rows:
            del index
            walk = ranking.walk(genome.scores(params))
            return walk.filled(affordable.within) if self.fills else walk.first(affordable.within)

        sampler = self.own_sampler(tightest.seed, space=genome.space, start=genome.start)
        quest = Quest(genome.space, sampler, row, lambda params: Widths(tightest, genome.scores(params)))
        found = search(tightest, self, quest, affordable)

        def path(trial: FrozenTrial) -> Rows:
            return through(ranking.walk(genome.scores(trial.params)).path(), row_of(trial))

        best, plan = select_measured(affordable, found, lambda trial: quest.widths(trial.params), path, self.fills)
        scores = genome.scores(best.params)
        whole = ranking.walk(scores).path()
        plans = []
        for problem in problems:
            learnt, walked, one = Widths(problem, scores), path(best), plan
            if problem is not tightest:
                walked, one = whole, fitting(learnt, whole, affordable.price, self.fills)
            plans.append(accepted(affordable, one, learnt, walked, self.fills, self.accept))
        return plans

    def check(self, problem: Problem) -> None:
        """Raise `DataError` where data are missing, before anything is measured."""

    def widths(self, problem: Problem) -> list[tuple[int, ...]]:
        """Widths and ranks on which a walk may stop, per group: all that the target's `align` allows."""
        return options_of(problem, "align", self.searched(problem))

    def genome(self, problem: Problem, legal: Sequence[Sequence[int]], affordable: Affordable) -> Genome:
        """What the parameters stand for."""
        del legal, affordable
        return NormRanking(problem)

    def own_sampler(self, seed: int, **more: Any) -> BaseSampler:
        """The regularised evolution."""
        population = max(round(64 / 400 * self.trials), 1) if self.population is None else self.population
        samples = max(int(_SAMPLES * population), 1)
        return LeGRSampler(seed, population, samples, self.trials, lag=self.parallel, **more)


class NormRanking:
    """α ||Θ||² + κ for every filter, κ in standard deviations of the layer's squared norms.

    Args:
        problem: The network.
    """

    def __init__(self, problem: Problem) -> None:
        scoring = Scoring(problem.channels)
        self._sizes: dict[str, int] = {}
        self._layers: list[tuple[str, str, NDArray[np.float64], NDArray[np.int64], float]] = []
        for group in problem.channels.free:
            for slot in scoring.filters(group):
                here, units = scoring.units(group, slot)
                norms = scoring.rows(slot).double().square().sum(1).cpu().numpy()
                deviation = float(norms.std())  # of the whole layer: padded shortcuts spread its filters over several groups
                self._layers.append((group.name, slot.name.removesuffix(".weight"), norms[here], units, deviation))
                self._sizes[group.name] = group.size
        for name, values in singular_values(problem.channels).items():
            squares = values**2
            self._layers.append((name, name, squares, np.arange(len(values)), float(squares.std())))
            self._sizes[name] = len(values)
        whole = {axis.name: _squared_norm(problem.channels, axis.branch) for axis in depth_of(problem.channels)}
        deviation = float(np.std(list(whole.values()) or [0.0]))  # of one unit there is none: that of all branches
        for name, square in whole.items():
            self._layers.append((name, name, np.array([square]), np.zeros(1, dtype=np.int64), deviation))
            self._sizes[name] = 1
        self.groups = frozenset(self._sizes)
        self.start: list[dict[str, float]] = []

    @property
    def space(self) -> dict[str, FloatDistribution]:
        """One unit of a sampler (an eighth of the range) is a factor of e, and a standard deviation."""
        found = {}
        for _, layer, *_ in self._layers:
            found[f"scale:{layer}"] = FloatDistribution(float(np.exp(-4)), float(np.exp(4)), log=True)
            found[f"shift:{layer}"] = FloatDistribution(-4.0, 4.0)
        return found

    def scores(self, params: Mapping[str, Any]) -> dict[str, Scores]:
        """See `Genome`."""
        sums = {name: np.zeros(size) for name, size in self._sizes.items()}
        for group, layer, norms, units, deviation in self._layers:
            own = params[f"scale:{layer}"] * norms + params[f"shift:{layer}"] * deviation
            sums[group] += np.bincount(units, own, self._sizes[group])
        return sums


def _squared_norm(channels: ChannelGraph, branch: Branch) -> float:
    layers = (channels.graph.get_submodule(name) for name in branch.layers)
    return sum(float(layer.weight.detach().double().square().sum()) for layer in layers if isinstance(layer, Conv | nn.Linear))
