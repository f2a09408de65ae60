"""CaP: pruning with compensation, as published (Xie et al., arXiv 2108.13728).

Released code: `ZhouyangXie/pseudopruner` for ranking and compensation, `ZhouyangXie/compensation` for the search.

**Compensation.** A layer y = W x + b that goes on reading only the inputs S gets, in closed form, the least E||y - W' x_S - b'||²:

    W' = W Σ_{:,S} Σ_SS⁻¹          b' = b + W μ - W' μ_S          (`passes/fitting/regression.py`)

and, in the released code, each output is scaled to the variance that it had.

**Ranking.** Channels are selected one after the other, each the one that lowers what is left of that error most; what was
selected last goes first (`passes/fitting/compensated_ranking.py`).

**Binary structural search with step constraint.** Statistics and rankings are those of the whole network. Layers are decided
in forward order; the accuracy that is tolerated falls by one step per layer, from the original's to the lowest tolerated:

    step = (accuracy - floor) / n;   tolerated = accuracy
    for each layer:   tolerated -= step;   low, high = 0, most
        K times:      middle = (low + high) / 2;   mask the tail of the ranking, compensate
                      low = middle if accuracy of the whole network >= tolerated else high = middle
        keep `low`, compensated

Where this differs from the released code:

* channels of tied filters are ranked together, over all their readers, and widths are multiples of the target's `align`;
* what is masked here is then really removed; groups that some op computes statistics over are left alone;
* a ridge of 1e-6 of the mean variance is added to the diagonal (there: none); constant channels are not special;
* accuracies are those of a hold-out of the training data (there: of the test set);
* K, `most` and the floor, which are not given there, are 5, 0.9 and the caller's; a budget is met by bisecting the floor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from compressor.errors import BudgetError, DataError
from compressor.methods.base import MethodSettings, Problem
from compressor.methods.losses.masked_network import Holdout, Masked
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.meets_budget import closest, meets
from compressor.methods.structures.paths import AIM
from compressor.passes.fitting.losses import rankable
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.values.plan import Plan
from compressor.values.settings import check

_FLOORS = 6  # bisection steps for the floor that a budget asks for


@dataclass(frozen=True)
class PublishedCaP(MethodSettings):
    """The binary structural search.

    Attributes:
        floor: Worst tolerated metric on the hold-out: of one in percent (accuracy, mIoU) as a share, 0 to 1; None: the highest
            by which the budget is met.
        steps: Bisection steps per group (K).
        most: The largest share of a group that goes.
        holdout: Images of the hold-out that are looked at.
        compensation: How layers are repaired.

    Raises:
        BudgetError: A setting is out of range.
    """

    name: ClassVar[str] = "cap"
    of_paper: ClassVar[bool] = True
    floor: float | None = None
    steps: int = 5
    most: float = 0.9
    holdout: int = 1000
    compensation: Compensation = field(default_factory=Compensation.published)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, {"floor": (1e-9, math.inf), "steps": (1, 20), "most": (0, 1), "holdout": (1, 1e9)})

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            DataError: There are no calibration images, or no hold-out.
            BudgetError: The budget or the floor cannot be met; the closest that can is said.
        """
        if problem.calibration is None:
            raise DataError("CaP needs images for its statistics (no labels): pass calibrate=… or train=…")
        holdout = Holdout.of(problem.channels, problem.validate, self.holdout)
        original = holdout.value(Prefix(problem.channels.graph, holdout.images, Shelf()), problem.channels.graph)
        if self.floor is None:
            return self._highest_floor(problem, holdout, original)
        floor = holdout.metric.floor(self.floor)
        if holdout.metric.lost(floor, original) > 0:
            raise BudgetError(f"CaP(floor={self.floor}): the original itself has {holdout.metric.text(original)} on the hold-out")
        plan = self.search(problem, holdout, original, floor)
        if not meets(problem, plan):
            raise BudgetError(f"the budget cannot be met with {self.floor} as the floor; {closest(problem, plan)}")
        return plan

    def search(self, problem: Problem, holdout: Holdout, original: float, floor: float) -> Plan:
        """The binary structural search with step constraint, between two values of the metric."""
        assert problem.calibration is not None
        lossy = {group.name for group in problem.channels.groups if group.lossy}  # masked there is not removed
        names = [name for name in rankable(problem.channels)[0] if name not in lossy]
        network = Masked(problem.channels, names, problem.calibration, holdout, self.compensation, problem.seed)
        tolerated, step = original, (original - floor) / max(len(names), 1)
        for name in network.order:
            tolerated -= step

            def enough(value: float, tolerated: float = tolerated) -> bool:
                return holdout.metric.lost(tolerated, value) <= 0

            width = self._decide(problem, network, name, enough)
            size = network.group(name).size
            said = f"{holdout.metric.name} at least {holdout.metric.text(tolerated)}"
            problem.progress.stage(f"{name} keeps {width} of {size} ({said})")
        return network.plan

    def _decide(self, problem: Problem, network: Masked, name: str, enough: Callable[[float], bool]) -> int:
        """Bisect the width of one group; returns it."""
        group, ranking = network.group(name), network.ranking(name)
        legal = [w for w in widths(group, problem.target.align) if w >= group.size * (1 - self.most)]
        low, high = 0.0, self.most
        best, tried = group.size, {group.size: True}
        for _ in range(self.steps):
            middle = 0.5 * (low + high)
            width = min((w for w in legal if w >= group.size * (1 - middle)), default=group.size)
            if width not in tried:
                network.mask(name, ranking, width)
                tried[width] = enough(network.metric(name))
            low, high = (middle, high) if tried[width] else (low, middle)
            best = min(best, width) if tried[width] else best
        network.mask(name, ranking, best)
        network.done(name)
        return best

    def _highest_floor(self, problem: Problem, holdout: Holdout, original: float) -> Plan:
        """The plan of the highest floor, from nothing to what the original has, whose network meets the budget."""

        def floor(share: float) -> float:
            if holdout.metric.higher_is_better:
                return share * original
            return original / share if share else math.inf

        low, high = 0.0, 1.0
        best = self.search(problem, holdout, original, floor(low))
        if not meets(problem, best):
            raise BudgetError(f"the budget cannot be met by removing at most {self.most} of each group; {closest(problem, best)}")
        for _ in range(_FLOORS):
            middle = 0.5 * (low + high)
            plan = self.search(problem, holdout, original, floor(middle))
            low, high, best = (middle, high, plan) if meets(problem, plan, AIM) else (low, middle, best)
        return best
