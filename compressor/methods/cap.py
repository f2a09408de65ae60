"""`CaP`: channels go in the order in which the others can make up for them, and are made up for.

`CaP.published()` is the paper (`published/cap.py`): ranking and compensation, and a search layer after layer by accuracy. Ours
keeps the ranking, and decides otherwise:

* **Widths by loss curves** instead of the search: notch after notch is taken, over all groups at once, where it costs the least
  loss (the error that compensation leaves behind the norm) for what it saves in MACs, parameters, bytes, or milliseconds of the
  latency model. ResNet-56 at 0.35 of its MACs keeps 88.3 %; the published search ends at 0.397 with 83.7 %.
* **How losses of different groups compare** is not decided beforehand: as they are, weighted by the *sensitivity* of the
  outputs to a loss in the group, or by its square root; for a latency also what savings are counted in, for ranks also what
  their loss counts for (`losses/allocation.py`). Each is tried, repaired, and the one whose outputs are nearest to the
  original's on images that took no part is taken (half the MACs: 91.5 %, without weights 91.0 %).
* **Compensation on the network's own features**, of all layers, shortcuts made up for (`Compensation`).
* **Ranks** may be axes beside the widths (`space="channels+ranks"`, sequences of a truncated SVD), their losses in the same
  units.
* With a **floor** instead of a budget, the walk by loss curves stops at the last network whose repaired accuracy on the
  hold-out holds.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from compressor.errors import BackendError, BudgetError, DataError
from compressor.methods.base import MethodSettings, Problem, Space
from compressor.methods.losses.allocation import BRANCH_PRICES, POWERS, RANK_PRICES, Allocation, Weighting
from compressor.methods.losses.curves import curves_of, images_for_losses
from compressor.methods.losses.deep_allocation import DeepAllocation
from compressor.methods.losses.floor import last_above
from compressor.methods.losses.nearness import Nearness
from compressor.methods.published.cap import PublishedCaP
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.meets_budget import closest, meets
from compressor.methods.structures.paths import Widths, first_within
from compressor.methods.structures.slower_sequences import refused
from compressor.passes.channels.search_space import depth_of, ranks_of
from compressor.passes.fitting.losses import Curve, rankable
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.runtime.latency_model.model import LatencyModel
from compressor.runtime.latency_model.training_engines import train_latency_model
from compressor.search.fitness import Fitness, Judge
from compressor.tasks.samples import samples_of
from compressor.values.loaders import is_missing
from compressor.values.plan import Plan
from compressor.values.settings import check

logger = logging.getLogger(__name__)

_JUDGED_ON = 512  # images that networks are repaired on while a floor is looked for
_NOTHING = "nothing of this network can be compressed by loss curves; `--method magnitude` needs no repair"
_BEGINNING = 0.5  # of the MACs: where the weightings of a walk to a floor are compared


@dataclass(frozen=True)
class CaP(MethodSettings):
    """Prune with compensation.

    Attributes:
        floor: Worst tolerated metric on the hold-out instead of a budget: of one in percent (accuracy, mIoU) as a share, 0 to 1.
        space: What may go: `channels`, `ranks` and `depth` (branches as a whole), or several of these, joined by `+`.
        accept: Whether sequences have to be faster on the target; `None`: where the budget is a latency.
        holdout: Images of the hold-out that a floor is looked at on.
        probes: Images that sensitivities are measured on.
        engines: Engines that the latency model is fitted to, where the budget is a latency.
        compensation: How the network is repaired.

    Raises:
        BudgetError: A setting is none of these.
    """

    name: ClassVar[str] = "cap"
    floor: float | None = None
    space: Space = "channels"
    accept: bool | None = None
    holdout: int = 1000
    probes: int = 256
    engines: int = 24
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        ranges = {"floor": (1e-9, math.inf), "holdout": (1, 1e9), "probes": (1, 1e9), "engines": (6, 1e4)}
        check(self, BudgetError, ranges)

    @classmethod
    def published(cls, floor: float | None = None) -> PublishedCaP:
        """As in the paper and its released code."""
        return PublishedCaP(floor)

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return bool({"ranks", "depth"} & self._parts)

    @property
    def _parts(self) -> set[str]:
        return set(self.space.split("+"))

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            DataError: There are no calibration images, or no labelled hold-out for a floor.
            BudgetError: The budget or the floor cannot be met; the closest that can is said.
        """
        images = images_for_losses(problem)
        self.check_possible(problem)
        problem = problem.over("ranks" in self._parts, "depth" in self._parts)
        allocate = DeepAllocation if depth_of(problem.channels) else Allocation
        for name, reason in rankable(problem.channels)[1].items():
            problem.progress.stage(f"{name} is left alone: {reason}")
        used, spared = _divide(images, self.probes)
        settings = self.compensation or Compensation()
        curves = curves_of(problem, used, settings, self.probes, groups="channels" in self._parts)
        if not curves:
            raise BudgetError(_NOTHING)
        if self.floor is not None:
            plan = self._to_floor(problem, allocate(problem, curves, None), used, spared)
            while slow := refused(problem, plan, self.accept):  # every round, at least one layer more is left plain
                curves = _without(problem, curves, slow)
                plan = self._to_floor(problem, allocate(problem, curves, None), used, spared)
            return plan
        latency = self._latency(problem)
        allocation = allocate(problem, curves, latency)
        order, current = self.order(problem, allocation, used, spared), True
        while True:  # every round, at least one layer more is left plain, or the weightings are compared without those
            plan = self.decided(problem, allocation, order)
            slow = refused(problem, plan, self.accept)
            if current and not slow:
                return plan
            if slow:
                curves = _without(problem, curves, slow)
                allocation = allocate(problem, curves, latency)
            else:
                order = self.order(problem, allocation, used, spared)
            current = not slow

    @staticmethod
    def decided(problem: Problem, allocation: Allocation, order: Sequence[Weighting]) -> Plan:
        """The plan of the first weighting by which the budget is met, as measured."""
        for choice in order:
            problem.progress.stage(str(choice))
            try:
                return allocation.decide(choice)
            except BudgetError as error:
                problem.progress.stage(f"{choice}: {error}")
                last = error
        raise last

    def order(self, problem: Problem, allocation: Allocation, used: Calibration, spared: Calibration) -> list[Weighting]:
        """Weightings, the one whose network is nearest to the original first; those that cannot meet the budget are left out."""
        nearness = Nearness(problem, self.compensation, used, spared)
        distances: dict[Weighting, float] = {}
        plans: dict[Weighting, Plan] = {}
        known: dict[str, float] = {}  # by the digests of plans

        def nearest(choices: Sequence[Weighting]) -> Weighting:
            for choice in choices:
                with suppress(BudgetError):  # without ranks, say, it may be out of reach
                    plan = plans[choice] = allocation.near(choice)
                    if plan.digest not in known:
                        known[plan.digest] = nearness(plan)
                        problem.progress.stage(f"{choice}: repaired, {known[plan.digest]:.4f} from the original")
                    distances[choice] = known[plan.digest]
            return min(distances, key=distances.__getitem__, default=choices[0])

        best = nearest([Weighting(weights) for weights in POWERS])
        if depth_of(problem.channels):
            best = nearest([replace(best, branch=price) for price in BRANCH_PRICES])
        best = nearest([replace(best, saved=saved) for saved in allocation.ways(plans.get(best))])
        if {"channels", "ranks"} <= self._parts:
            nearest([replace(best, price=price) for price in RANK_PRICES])
        logger.info("CaP: %s", "; ".join(f"{choice}: {value:.4f}" for choice, value in distances.items()))
        return sorted(distances, key=distances.__getitem__) or [best]

    def _to_floor(self, problem: Problem, allocation: Allocation, used: Calibration, spared: Calibration) -> Plan:
        """The last network of the walk that is right often enough once it is repaired."""
        assert self.floor is not None
        if is_missing(problem.validate):
            raise DataError("a floor is looked at on a hold-out: pass validate=…")
        repair: Literal["compensate", "recalibrate"] = "compensate" if self.compensation else "recalibrate"
        fitness = Fitness(repair, "metric", holdout=self.holdout, images=_JUDGED_ON)
        judge = Judge(problem.channels, fitness, problem.validate, used, seed=problem.seed)
        metric = samples_of(problem.validate).task.metric
        limits = {"macs": _BEGINNING * problem.costs(problem.channels.full)["macs"], **problem.limits}
        halved = replace(problem, limits=limits)
        weighting = self.order(halved, type(allocation)(halved, allocation.curves, None), used, spared)[0]
        plan = last_above(problem, allocation, weighting, judge, metric, self.floor)
        if not meets(problem, plan):
            raise BudgetError(f"the budget cannot be met with {self.floor} as the floor; {closest(problem, plan)}")
        return plan

    def check_possible(self, problem: Problem) -> None:
        """Look before anything is computed, and measured, whether the narrowest network is small enough.

        Raises:
            BudgetError: It is not, or there is nothing to decide over.
        """
        problem = problem.over("ranks" in self._parts, "depth" in self._parts)
        names = {axis.name for axis in ranks_of(problem.channels)}
        if self.space == "ranks" and not names:
            raise BudgetError("no layer of this network is worth a sequence of smaller ones: there are no ranks to reduce")
        names |= {axis.name for axis in depth_of(problem.channels)}
        if self.space == "depth" and not names:
            raise BudgetError("this network has no branch beside a shortcut: nothing of it can be removed as a whole")
        if "channels" in self._parts:
            names |= set(rankable(problem.channels)[0])
        if not names:
            raise BudgetError(_NOTHING)
        narrowest = [widths(g, problem.target.align)[0] if g.name in names else g.size for g in problem.channels.groups]
        first_within(Widths(problem, {}), np.array([narrowest], dtype=np.int64))

    def _latency(self, problem: Problem) -> LatencyModel | None:
        if "latency" not in problem.limits:
            return None
        problem.progress.stage(f"latency model: {self.engines} engines")
        legal = [widths(group, problem.target.align) for group in problem.channels.groups]
        try:
            return train_latency_model(
                problem.channels, legal, problem.target, self.engines, problem.seed, progress=problem.progress,
                observed=problem.observe,
            )  # fmt: skip
        except BackendError as error:
            logger.warning("CaP: no latency model for this target (%s); notches are chosen by MACs, then measured", error)
            return None


def _without(problem: Problem, curves: Mapping[str, Curve], layers: frozenset[str]) -> dict[str, Curve]:
    """Curves but for those of the ranks of some layers, which stay plain."""
    plain = {axis.name for axis in ranks_of(problem.channels) if axis.layer in layers}
    return {name: own for name, own in curves.items() if name not in plain}


def _divide(calibration: Calibration, spare: int) -> tuple[Calibration, Calibration]:
    """Images to fit on, and images to judge by: at most `spare`, and a quarter of them where there are few."""
    spared = calibration.first(min(spare, max(calibration.images // 4, 1)))
    return calibration.after(spared.images), spared
