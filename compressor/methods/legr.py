"""`LeGR`: one learnt global ranking of all channels, and from it a whole family of networks at many budgets.

Chin et al., CVPR 2020. The importance of filter i of layer l is

    I = alpha_l * ||theta_i||_2^2 + kappa_l,

and channels with the lowest go until the budget is met. alpha and kappa are learnt once, at the tightest budget, by
aging evolution (`LeGRSampler`) over what the pruned network is worth; for every other budget the same ranking is walked
less far. Filters that are tied (by an addition, by a depthwise layer) have one score, the sum of theirs (as
released) or the mean.

`LeGR.published()` is the released code with its constants. What goes beyond it, each an option:

* `fitness`: batch norms recalibrated, or layers compensated in closed form, before a candidate is judged;
* `ranking="loss"`: channels are ranked by the loss that compensation cannot make up for (`losses.py`), per what they save: MACs,
  or milliseconds of the latency model where latency is limited. On a logarithmic scale; alpha stretches it, kappa shifts it,
  and one parameter more weighs the sensitivity of all groups. The identity is an allocation of `CaP`, and the first
  trials are those of its other weightings;
* budgets of any kind, latency by a model that learns from measured leaders; `steps`: legal widths of the target.

Where this differs from the released code: a quota holds for a group, not for a layer (there, an exhausted layer's
shortcut ends misaligned), and candidates are judged on images held out of the training data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.searching.genomes import Genome, LossRanking, NormRanking, images_for_losses
from compressor.methods.searching.selection import accepted, row_of, select_measured
from compressor.methods.searching.trials import Quest, SearchingMethod, search
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.legal import widths
from compressor.methods.structures.paths import Rows, Widths, fitting, through
from compressor.methods.structures.steps import Steps, options_of
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.fitting.settings import Compensation
from compressor.passes.labels.groups import ChannelGroup
from compressor.search.fitness import Fitness
from compressor.search.samplers import LeGRSampler
from compressor.values.plan import Plan

_POPULATION = 64 / 400  # of the trials


@dataclass(frozen=True)
class LeGR(SearchingMethod):
    """Learn a global ranking, and prune by it to one or several budgets.

    Attributes, besides those of `SearchingMethod`:
        ranking: What is scaled and shifted: squared filter `norm`s, or the `loss` of each channel.
        aggregate: Of the scores of tied filters, by norm: `sum` as released, or `mean`. The sum measures better: as published at
            half the MACs of a ResNet-56 it leaves 78.71 % before any training, the mean 45.99 % (`tools/bench_search.py`).
        steps: Widths that a walk stops on: multiples of the target's `align`, those among them that are right edges of each group's
            measured `staircase` on the target, or `eighths` of the group. By default staircases where latency is limited, else
            all multiples. Asked for half the latency of a ResNet-56, `align=8`, staircases keep 83.46 % before any training at a
            measured 0.500, all multiples 83.02 % at 0.515 (`tools/bench_search.py --goals latency:0.5 --align 8 --seeds 0
            --only "LeGR, compensated;LeGR, multiples, compensated"`).
        fill: Whether notches that the budget still allows where the walk stops are undone, the latest first: where legal widths are
            few, the last notch may overshoot. Not as published; members of a family are then not always nested in each other.
        quota: Share of every group that stays (at least two channels).
        population: See `LeGRSampler`; by default as large a share of the trials as published, 64 of 400.
        samples: See there; a quarter of the population by default, as published.
        sigma: See there.
        mutate: See there.
        identity: Which trial is the unchanged ranking; the last of the first population, as published, by default.

    Raises:
        BudgetError: A setting is out of range.
    """

    sampler: str = "legr"
    ranking: Literal["norm", "loss"] = "loss"
    aggregate: Literal["sum", "mean"] = "sum"
    steps: Steps | None = None
    fill: bool = True
    quota: float = 0.1
    population: int | None = None
    samples: int | None = None
    sigma: float = 1.0
    mutate: float = 0.1
    identity: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not 0 <= self.quota < 1:
            raise BudgetError(f"LeGR(quota={self.quota}): the share that stays must lie in [0, 1)")
        try:
            self._sampler(0, {})
        except ValueError as error:
            raise BudgetError(str(error)) from error

    @classmethod
    def published(cls, trials: int = 400, steps: int = 0) -> "LeGR":
        """As in the released code: squared norms, summed over tied filters; `steps` of training before a candidate is judged.

        Args:
            trials: Evaluations (E).
            steps: tau; 0 in the script of the paper's Table 1, 200 elsewhere.
        """
        fitness = Fitness("train", steps=steps) if steps else Fitness("none")
        own = {"ranking": "norm", "steps": "align", "fill": False, "distinct": False, "population": 64, "samples": 16}
        return cls(trials, fitness, compensation=None, **own)  # type: ignore[arg-type]

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
        if self.ranking == "loss":
            images_for_losses(tightest)  # or an error, before anything is measured
        groups = tightest.channels.groups
        legal = self._legal(tightest)
        affordable = Affordable(tightest, legal, self.engines)
        genome = self._genome(tightest, legal, affordable)
        options = [own if group.name in genome.groups else (group.size,) for group, own in zip(groups, legal, strict=True)]
        ranking = GlobalRanking(groups, options)
        affordable.check(ranking.narrowest)

        def row(params: Mapping[str, Any], index: int) -> Rows:
            del index
            walk = ranking.walk(genome.scores(params))
            return walk.filled(affordable.within) if self.fill else walk.first(affordable.within)

        space, start = genome.space, genome.start
        own = {"legr": lambda: self._sampler(tightest.seed, space, start)}
        quest = Quest(space, own, row, lambda p: Widths(tightest, genome.scores(p)))
        found = search(tightest, self, quest, affordable)

        def path(trial: FrozenTrial) -> Rows:
            return through(ranking.walk(genome.scores(trial.params)).path(), row_of(trial))

        best, plan = select_measured(affordable, found, lambda trial: quest.widths(trial.params), path, self.fill)
        scores = genome.scores(best.params)
        whole = ranking.walk(scores).path()
        plans = []
        for problem in problems:
            learnt, walked, one = Widths(problem, scores), path(best), plan
            if problem is not tightest:
                walked, one = whole, fitting(learnt, whole, affordable.price, self.fill)
            plans.append(accepted(affordable, one, learnt, walked, self.fill, self.accept))
        return plans

    def _genome(self, problem: Problem, legal: Sequence[Sequence[int]], affordable: Affordable) -> Genome:
        if self.ranking == "norm":
            return NormRanking(problem, self.aggregate)
        settings = self.compensation or Compensation()
        return LossRanking(problem, settings, legal, affordable.price, probes=self.probes)

    def _legal(self, problem: Problem) -> list[tuple[int, ...]]:
        """Widths and ranks on which a walk may stop, per group."""
        groups = problem.channels.groups
        steps = self.steps or ("staircase" if "latency" in problem.limits else "align")
        found = options_of(problem, steps, frozenset(group.name for group in groups))
        return [self._above_quota(group, own, problem.target.align) for group, own in zip(groups, found, strict=True)]

    def _above_quota(self, group: ChannelGroup, legal: tuple[int, ...], align: int) -> tuple[int, ...]:
        if isinstance(group, RankAxis) or len(legal) == 1:
            return legal
        least = max(int(np.ceil(self.quota * group.size)), 2)
        found = tuple(w for w in legal if w >= least or w == group.size)
        if len(found) > 1:
            return found
        return tuple(w for w in widths(group, align) if w >= least or w == group.size)  # all steps may lie below the quota

    def _sampler(self, seed: int, space: Mapping[str, FloatDistribution], start: Sequence[Mapping[str, float]] = ()) -> BaseSampler:
        population = max(round(_POPULATION * self.trials), 1) if self.population is None else self.population
        samples = max(population // 4, 1) if self.samples is None else self.samples
        own = (population, samples, self.trials, self.sigma, self.mutate, self.identity, self.parallel)
        return LeGRSampler(seed, *own, space, start)
