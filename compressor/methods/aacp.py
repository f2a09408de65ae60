"""`AACP`: a structure vector under several budgets at once, found by an improved differential evolution without training.

`AACP.published()` is the paper (`published/aacp.py`). Ours is the same evolution of the same vectors, with what was measured to
be better (ResNet-56 to half its MACs, 120 candidates, before any training: as published 82.3 %, ours 91.2 %):

* the steps of a group are those of its measured **staircase** on the target, instead of eighths;
* channels within a group are ordered by the **loss** that compensation cannot make up for (`LossRanking`), instead of the L1
  norm; of the first ten members three are `CaP`'s allocations and two are those with noise, as are members drawn anew;
* candidates are **compensated** in closed form before they are judged (`Fitness("compensate")`), as the result is;
* residual **streams** are pruned too;
* steps that a repaired candidate still affords are **given back**, to groups drawn at random;
* a candidate that stands for a network judged before is drawn anew.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from optuna.samplers import BaseSampler

from compressor.methods.base import Problem
from compressor.methods.losses.curves import images_for_losses
from compressor.methods.published.aacp import PublishedAACP
from compressor.methods.searching.loss_ranking import SENSITIVITIES, LossRanking
from compressor.methods.searching.structure_vectors import Vectors
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import GlobalRanking, Walk
from compressor.methods.structures.searched_widths import options_of
from compressor.passes.criteria import Scores
from compressor.passes.fitting.losses import rankable
from compressor.passes.fitting.settings import Compensation
from compressor.search.fitness import Fitness

_NEAR = 0.5  # of the first population: around `CaP`'s allocations, the others are drawn
_NOISE = 0.2  # standard deviation of the logarithm of levels around an allocation's


@dataclass(frozen=True)
class AACP(PublishedAACP):
    """Search a structure vector under budgets.

    Attributes, besides those of `SearchingMethod`:
        population: Members of the evolution.
        steps: Widths that are searched: of the measured `staircase`, or all multiples of the target's `align`.

    Raises:
        BudgetError: A setting is out of range.
    """

    trials: int = 400
    fitness: Fitness = field(default_factory=lambda: Fitness("compensate"))
    compensation: Compensation | None = field(default_factory=Compensation)
    steps: Literal["staircase", "align"] = "staircase"

    of_paper: ClassVar[bool] = False
    fills: ClassVar[bool] = True
    distinct: ClassVar[bool] = True

    @classmethod
    def published(cls, trials: int = 2010) -> PublishedAACP:
        """As in the paper and its released code; so many evaluations, with those of the first population."""
        return PublishedAACP(trials)

    def check(self, problem: Problem) -> None:
        """See there."""
        images_for_losses(problem)

    def options(self, problem: Problem) -> list[tuple[int, ...]]:
        """See there."""
        beyond = {group.name for group in problem.channels.free} - set(rankable(problem.channels)[0])
        return options_of(problem, self.steps, self.searched(problem) - beyond)

    def scores(self, problem: Problem, options: list[tuple[int, ...]], affordable: Affordable) -> dict[str, Scores]:
        """By the loss after compensation."""
        return self._by_loss(problem, options, affordable, SENSITIVITIES[0])

    def walks(self, problem: Problem, options: list[tuple[int, ...]], affordable: Affordable) -> list[Walk]:
        """Those on which `CaP`'s allocations lie."""
        ranking, count = GlobalRanking(problem.channels.groups, options), self._near
        return [ranking.walk(self._by_loss(problem, options, affordable, power)) for power in SENSITIVITIES[:count]]

    def evolution(self, seed: int, vectors: Vectors, walks: list[Walk], **more: Any) -> BaseSampler:
        """Begun, and begun anew, near the allocations."""
        allocations, random = vectors.allocations(walks), np.random.default_rng([seed, 2])
        count = self._near if allocations else 0
        near = [vectors.near(allocations[k % len(allocations)], random, _NOISE * (k >= len(allocations))) for k in range(count)]

        def fresh(random: np.random.Generator) -> dict[str, Any]:
            found = vectors.allocations(walks)  # by the latency model as it is now
            return vectors.params(vectors.near(found[random.integers(len(found))], random, _NOISE))

        start = [vectors.params(levels) for levels in near]
        return super().evolution(seed, vectors, walks, start=start, fresh=fresh if start else None, **more)

    @property
    def _near(self) -> int:
        return int(_NEAR * self.population)

    def _by_loss(self, problem: Problem, options: list[tuple[int, ...]], affordable: Affordable, power: float) -> dict[str, Scores]:
        settings = self.compensation or Compensation()
        return LossRanking(problem, settings, options, affordable.price, power, self.probes, "channels" in self.parts).plain
