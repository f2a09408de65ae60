"""`CaP`: pruning with compensation. Channels go in the order in which the others can make up for them, and are made up for.

The published method ranks the input channels of every layer by the error that is left *after* compensation, and
decides bottom-up how many of them go: layer after layer, by bisection on the accuracy of a hold-out, the accuracy that is
tolerated falling linearly from the original's to the floor. No training at all (`CaP(floor=…)`).

With a budget instead of a floor the widths come from the loss curves of the ranking: notch after notch is taken where it
costs the least loss for what it saves (in MACs, parameters, bytes, or milliseconds of the latency model).

How the losses of different groups compare is decided by `weights`: `plain` (an error behind the norm is an error, wherever it
is; later layers partly make up for it), `sensitivity` (by what an error in this group alone does to the outputs),
`mixed` (the geometric mean), or `best`: all three are tried, repaired, and the one whose outputs are nearest to the
original's on images that took no part is taken. For a latency it is then tried what savings are counted in (`SAVED`):
milliseconds, MACs, or both; the budget has to be met by the model's milliseconds, then measured ones, in any case.

Ranks of layers can be axes beside the widths (`space="channels+ranks"`, sequences of a truncated SVD): what a lower rank loses is
in the same units (`rank_losses.py`), what it saves is counted exactly. Compensation makes up for a part of it in other layers, but
not as it does for channels: with `best` a few prices of ranks are tried, the weighting first, and channels alone.

Where this differs from the released code: channels of tied filters are ranked together, over all their readers; removal
is real; statistics may be collected anew after every decision (`recollect`), and the hold-out is one of the training data.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np

from compressor.errors import BackendError, BudgetError, DataError
from compressor.methods.base import Problem
from compressor.methods.losses.allocation import POWERS, RANK_PRICE, Policy, Weighting, decided
from compressor.methods.losses.bottom_up import BottomUp, labelled
from compressor.methods.losses.curves import curves_of
from compressor.methods.losses.nearness import Nearness
from compressor.methods.losses.streams import POLICIES, is_stream
from compressor.methods.structures.accept import refused
from compressor.methods.structures.legal import widths
from compressor.methods.structures.paths import AIM, Widths, first_within
from compressor.passes.channels.rank_axes import axes_of
from compressor.passes.fitting.losses import Curve, rankable
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.runtime.latency_model.model import LatencyModel
from compressor.runtime.latency_model.training import train_latency_model
from compressor.values.plan import Plan
from compressor.values.settings import check

logger = logging.getLogger(__name__)

_RANGES = {"steps": (1, 20), "most": (0, 1), "holdout": (1, 1e9), "probes": (1, 1e9), "engines": (6, 1e4)}
_PRICES = (1.0, 0.25, RANK_PRICE, None)  # of what ranks lose; None: channels alone
_FLOORS = 6  # bisection steps for the floor that a budget asks of the bottom-up search


@dataclass(frozen=True)
class CaP:
    """Prune with compensation.

    Attributes:
        floor: Lowest tolerated share of right answers on the hold-out, 0 to 1; makes the search bottom-up.
        search: `allocation` by loss curves, or `bottom-up`.
        steps: Bisection steps per group of the bottom-up search (K).
        most: The largest share of a group that the bottom-up search removes.
        recollect: Whether the bottom-up search collects statistics anew behind what it has decided; as published, it
            does not.
        weights: How the losses of groups compare: `plain`, `mixed`, `sensitivity` or `best`.
        streams: What becomes of residual streams (`streams.py`): pruned as a `group`, left alone (`inside`), read in part
            through a `gather` where that was measured to pay, or `best`: all three are tried like the weightings.
        holdout: Images of the hold-out that the bottom-up search looks at.
        space: What may go: `channels`, `ranks`, or `channels+ranks`.
        accept: Whether sequences have to be faster on the target; `None`: where the budget is a latency.
        probes: Images that sensitivities are measured on.
        engines: Engines that the latency model is fitted to, where the budget is a latency.
        compensation: How the network is repaired.

    Raises:
        BudgetError: A setting is none of these.
    """

    floor: float | None = None
    search: Literal["allocation", "bottom-up"] = "allocation"
    steps: int = 5
    most: float = 0.9
    recollect: bool = True
    weights: Literal["best", "plain", "mixed", "sensitivity"] = "best"
    streams: Literal["group", "inside", "gather", "best"] = "group"
    space: Literal["channels", "ranks", "channels+ranks"] = "channels"
    accept: bool | None = None
    holdout: int = 1000
    probes: int = 256
    engines: int = 24
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, _RANGES)
        if self.floor is not None and not 0 < self.floor <= 1:
            raise BudgetError(f"CaP(floor={self.floor}): a share of right answers, above 0 and at most 1, such as 0.92")
        if self.bottom_up and (self.compensation is None or self.streams in ("gather", "best")):
            raise BudgetError(
                "CaP: the bottom-up search compensates; it prunes streams as a `group` or leaves them alone (`inside`)"
            )
        if self.space != "channels" and (self.bottom_up or self.streams in ("gather", "best")):
            raise BudgetError(f"CaP(space={self.space!r}): by loss curves, with streams as a `group` or left alone (`inside`)")

    @property
    def bottom_up(self) -> bool:
        """Whether the search is the bottom-up one."""
        return self.floor is not None or self.search == "bottom-up"

    @property
    def name(self) -> str:
        """As the command knows it."""
        return "cap"

    @classmethod
    def published(cls, floor: float | None = None) -> "CaP":
        """As in the released code: bottom-up, statistics of the original network, output variances kept."""
        return cls(floor=floor, search="bottom-up", recollect=False, compensation=Compensation.published())

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return self.space != "channels"

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {"name": self.name, **asdict(self)}

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            DataError: There are no calibration images, or no labelled hold-out for a floor.
            BudgetError: The budget or the floor cannot be met; the closest that can is said.
        """
        if problem.calibration is None:
            raise DataError("CaP needs images for its statistics (no labels): pass calibrate=… or train=…")
        if self.bottom_up:
            return self._bottom_up(problem)
        return self._allocated(problem, problem.calibration)

    # by loss curves

    def _allocated(self, problem: Problem, calibration: Calibration) -> Plan:
        problem = problem if self.space == "channels" else problem.with_ranks()
        if self.space == "ranks" and not axes_of(problem.channels):
            raise BudgetError("no layer of this network is worth a sequence of smaller ones: there are no ranks to reduce")
        _check_possible(problem, self.streams, self.space)
        for name, reason in rankable(problem.channels)[1].items():
            problem.progress.stage(f"{name} is left alone: {reason}")
        several = "best" in (self.weights, self.streams)
        used, spared = _divide(calibration, self.probes) if several else (calibration, calibration)
        probes = self.probes if self.weights != "plain" else 0
        gathers = self.streams in ("gather", "best")
        settings = self.compensation or Compensation()
        curves = curves_of(problem, used, settings, probes, groups=self.space != "ranks", by_reader=gathers)
        if not curves:
            raise BudgetError("nothing of this network can be compressed by loss curves; `--method magnitude` needs no repair")
        latency = self._latency(problem)
        policies = self._policies(problem, curves, latency)
        order, current = self._order(problem, policies, used, spared), True
        while True:  # every round, at least one layer more is left plain, or the weightings are compared without those
            plan = decided(problem, policies, order)
            slow = refused(problem, plan, self.accept)
            if not slow and current:
                return plan
            if slow:
                axes = {axis.name for axis in axes_of(problem.channels) if axis.layer in slow.sequences}
                curves = {name: curve for name, curve in curves.items() if name not in axes}
                policies, current = self._policies(problem, curves, latency), False
            else:
                order, current = self._order(problem, policies, used, spared), True

    def allocate(
        self,
        problem: Problem,
        curves: Mapping[str, Curve],
        used: Calibration,
        spared: Calibration,
        latency: LatencyModel | None = None,
    ) -> Plan:
        """Widths, and ranks where these are axes, by loss curves.

        Args:
            problem: With the budget.
            curves: Of every group that may be pruned.
            used: Images to compensate on, where several weightings are compared.
            spared: Images to compare them by.
            latency: In whose milliseconds savings are counted; without it in what the budget limits, a latency in MACs.

        Raises:
            BudgetError: The budget cannot be met; the closest that can is said.
        """
        policies = self._policies(problem, curves, latency)
        return decided(problem, policies, self._order(problem, policies, used, spared))

    def _policies(self, problem: Problem, curves: Mapping[str, Curve], latency: LatencyModel | None) -> dict[str, Policy]:
        found = {name: Policy(problem, curves, name, latency) for name in (POLICIES if self.streams == "best" else (self.streams,))}
        if self.streams == "best" and not found["gather"].readers:
            del found["gather"]  # no gather pays: the same as `inside`
        return found

    def _order(self, problem: Problem, policies: Mapping[str, Policy], used: Calibration, spared: Calibration) -> list[Weighting]:
        """Weightings, the one whose network is nearest to the original first; those that cannot meet the budget are left out."""
        every = tuple(POWERS) if self.weights == "best" else (self.weights,)
        choices = [Weighting(streams, weights) for streams in policies for weights in every]
        distances: dict[Weighting, float] = {}

        def compare(choices: Sequence[Weighting]) -> None:
            for choice in choices:
                if choice not in distances:
                    with suppress(BudgetError):  # without ranks, say, it may be out of reach
                        plan = policies[choice.streams].near(choice)
                        distances[choice] = nearness(plan)

        if len(choices) == 1 and self.weights != "best":
            return choices
        nearness = Nearness(problem, self.compensation, used, spared)
        compare(choices)
        if self.weights == "best":
            best = min(distances, key=distances.__getitem__, default=choices[0])
            compare([replace(best, saved=saved) for saved in policies[best.streams].ways])
        if self.weights == "best" and self.space == "channels+ranks":
            best = min(distances, key=distances.__getitem__, default=choices[0])
            compare([replace(best, price=price) for price in _PRICES])
        logger.info("CaP: %s", "; ".join(f"{choice}: {value:.4f}" for choice, value in distances.items()))
        return sorted(distances, key=distances.__getitem__) or choices

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

    # bottom-up

    def _bottom_up(self, problem: Problem) -> Plan:
        assert problem.calibration is not None
        ranked, _ = rankable(problem.channels)
        lossy = {group.name for group in problem.channels.groups if group.lossy}  # masked there is not removed
        allowed = [name for name in ranked if self.streams == "group" or not is_stream(problem.channels, name)]
        names = tuple(name for name in allowed if name not in lossy)
        search = BottomUp(
            problem,
            problem.calibration,
            labelled(problem, self.holdout),
            self.compensation or Compensation(),
            self.steps,
            self.most,
            self.recollect,
            names,
        )
        if self.floor is None:
            return self._highest_floor(problem, search)
        original = search.accuracy()
        if original < self.floor:
            raise BudgetError(f"CaP(floor={self.floor}): the original itself is right on {original:.3f} of the hold-out")
        plan = search.run(self.floor)
        if not _meets(problem, plan):
            raise BudgetError(f"the budget cannot be met with {self.floor} as the lowest accuracy; {_found(problem, plan)}")
        return plan

    def _highest_floor(self, problem: Problem, search: BottomUp) -> Plan:
        """The plan of the highest floor whose network meets the budget."""
        low, high = 0.0, search.accuracy()
        best = search.run(low)
        if not _meets(problem, best):
            raise BudgetError(f"the budget cannot be met by removing at most {self.most} of each group; {_found(problem, best)}")
        for _ in range(_FLOORS):
            middle = 0.5 * (low + high)
            plan = search.run(middle)
            low, high, best = (middle, high, plan) if _meets(problem, plan, AIM) else (low, middle, best)
        return best


def _check_possible(problem: Problem, streams: str, space: str) -> None:
    """Raise `BudgetError` before anything is computed where even the narrowest network is too large."""
    if streams in ("gather", "best"):
        return  # what a gather saves is not known yet
    names = {axis.name for axis in axes_of(problem.channels)}
    if space != "ranks":
        names |= {name for name in rankable(problem.channels)[0] if streams == "group" or not is_stream(problem.channels, name)}
    narrowest = [widths(g, problem.target.align)[0] if g.name in names else g.size for g in problem.channels.groups]
    first_within(Widths(problem, {}), np.array([narrowest], dtype=np.int64))


def _divide(calibration: Calibration, spare: int) -> tuple[Calibration, Calibration]:
    """Images to fit on, and images to judge by: at most `spare`, and a quarter of them where there are few."""
    spared = calibration.first(min(spare, max(calibration.images // 4, 1)))
    return calibration.after(spared.images), spared


def _meets(problem: Problem, plan: Plan, aim: float = 1.0) -> bool:
    costs = problem.costs(problem.channels.structure(plan))
    if any(costs[name] > limit for name, limit in problem.limits.items() if name in costs):
        return False
    return "latency" not in problem.limits or problem.measure(plan).ratio <= aim * problem.limits["latency"]


def _found(problem: Problem, plan: Plan) -> str:
    costs = problem.costs(problem.channels.structure(plan))
    said = [f"{name} {costs[name]:,.0f} (asked: {limit:,.0f})" for name, limit in problem.limits.items() if name in costs]
    if "latency" in problem.limits:
        said.append(f"latency {problem.measure(plan).ratio:.3f} of the original (asked: {problem.limits['latency']:.3f})")
    return "the closest has " + ", ".join(said)
