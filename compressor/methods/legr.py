"""`LeGR`: one learnt global ranking of all channels, and from it a whole family of networks at many budgets.

`LeGR.published()` is the paper (`published/legr.py`). Ours is the same walk and the same evolution, with what was measured to
be better (ResNet-56 to half its MACs, 120 candidates, before any training: as published 78.7 %, ours 91.2 %):

* channels are ranked by the **loss** that compensation cannot make up for, per what they save, instead of by norms
  (`LossRanking`): the identity is an allocation of `CaP`, and the first trials are those of its other weightings;
* candidates are **compensated** in closed form before they are judged (`Fitness("compensate")`), as the result is;
* where latency is limited, a walk stops on the measured **staircase** of each group on the target (83.5 % at half the latency;
  on all multiples of `align` 83.0 %);
* notches that the budget still allows where a walk stops are **undone**; members of a family are then not always nested;
* a candidate that stands for a network judged before is drawn anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from compressor.methods.base import Problem
from compressor.methods.losses.curves import images_for_losses
from compressor.methods.published.legr import PublishedLeGR
from compressor.methods.searching.loss_ranking import Genome, LossRanking
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.searched_widths import options_of
from compressor.passes.fitting.settings import Compensation
from compressor.search.fitness import Fitness


@dataclass(frozen=True)
class LeGR(PublishedLeGR):
    """Learn a global ranking by losses, and prune by it to one or several budgets.

    Attributes, besides those of `SearchingMethod`:
        population: Of the evolution; by default as large a share of the trials as published, 64 of 400.

    Raises:
        BudgetError: A setting is out of range.
    """

    fitness: Fitness = field(default_factory=lambda: Fitness("compensate"))
    compensation: Compensation | None = field(default_factory=Compensation)
    population: int | None = None

    of_paper: ClassVar[bool] = False
    fills: ClassVar[bool] = True
    distinct: ClassVar[bool] = True

    @classmethod
    def published(cls, trials: int = 400, steps: int = 0) -> PublishedLeGR:
        """As in the paper and its released code.

        Args:
            trials: Evaluations (E).
            steps: Of training before a candidate is judged (tau): 0 in the script of the paper's Table 1, 200 elsewhere.
        """
        return PublishedLeGR(trials, Fitness("train", steps=steps) if steps else Fitness("none"))

    def check(self, problem: Problem) -> None:
        """See there."""
        images_for_losses(problem)

    def widths(self, problem: Problem) -> list[tuple[int, ...]]:
        """See there."""
        return options_of(problem, "staircase" if "latency" in problem.limits else "align", self.searched(problem))

    def genome(self, problem: Problem, legal: Sequence[Sequence[int]], affordable: Affordable) -> Genome:
        """See there."""
        settings, groups = self.compensation or Compensation(), "channels" in self.parts
        return LossRanking(problem, settings, legal, affordable.price, probes=self.probes, groups=groups)
