"""`CaP`: pruning with compensation. Channels go in the order in which the others can make up for them, and are made up for.

The published method ranks the input channels of every layer by the error that is left *after* compensation, and
decides bottom-up how many of them go: layer after layer, by bisection on the accuracy of a hold-out, the accuracy that is
tolerated falling linearly from the original's to the floor. No training at all (`CaP(floor=…)`).

With a budget instead of a floor the widths come from the loss curves of the ranking: notch after notch is taken where it
costs the least loss for what it saves (in MACs, parameters, bytes, or milliseconds of the latency model).

How the losses of different groups compare is decided by `weights`: `plain` (an error behind the norm is an error, wherever it
is; later layers partly make up for it), `sensitivity` (by what an error in this group alone does to the outputs),
`mixed` (the geometric mean), or `best`: all three are tried, repaired, and the one whose outputs are nearest to the
original's on images that took no part is taken.

Where this differs from the released code: channels of tied filters are ranked together, over all their readers; removal
is real; statistics may be collected anew after every decision (`recollect`), and the hold-out is one of the training data.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BackendError, BudgetError, DataError
from compressor.evaluate import pair_of
from compressor.methods.base import Problem
from compressor.methods.bottom_up import BottomUp, Holdout
from compressor.methods.paths import Rows, fitting, resolve, steepest
from compressor.passes.calibration import Calibration
from compressor.passes.channels import ChannelGraph
from compressor.passes.compensate import Compensate
from compressor.passes.compensation import Compensation
from compressor.passes.losses import Curve, divergence, log_probabilities, loss_curves, rankable
from compressor.passes.prefix import Prefix, Shelf
from compressor.passes.remove_channels import RemoveChannels
from compressor.plan import Plan
from compressor.runtime.model_training import train_latency_model
from compressor.space import widths

logger = logging.getLogger(__name__)

_POWERS = {"plain": 0.0, "mixed": 0.5, "sensitivity": 1.0}  # of the sensitivity
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
        streams: Whether channels that several layers add to (residual streams) are pruned, or only those inside blocks.
        holdout: Images of the hold-out that the bottom-up search looks at.
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
    streams: bool = True
    holdout: int = 1000
    probes: int = 256
    engines: int = 24
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.floor is not None and not 0 < self.floor <= 1:
            raise BudgetError(f"CaP(floor={self.floor}): a share of right answers, above 0 and at most 1, such as 0.92")
        for name, known in (("search", ("allocation", "bottom-up")), ("weights", ("best", *_POWERS))):
            if getattr(self, name) not in known:
                raise BudgetError(f"CaP({name}={getattr(self, name)!r}): known are {', '.join(known)}")
        for name, least, highest in (
            ("steps", 1, 20),
            ("most", 0, 1),
            ("holdout", 1, 1e9),
            ("probes", 1, 1e9),
            ("engines", 6, 1e4),
        ):
            if not least <= getattr(self, name) <= highest:
                raise BudgetError(f"CaP({name}={getattr(self, name)}): must lie between {least:g} and {highest:g}")

    @property
    def name(self) -> str:
        """As the command knows it."""
        return "cap"

    @classmethod
    def published(cls, floor: float | None = None) -> "CaP":
        """As in the released code: bottom-up, statistics of the original network, output variances kept."""
        return cls(floor=floor, search="bottom-up", recollect=False, compensation=Compensation.published())

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
        if self.floor is not None or self.search == "bottom-up":
            return self._bottom_up(problem)
        return self._allocated(problem, problem.calibration)

    # by loss curves

    def _allocated(self, problem: Problem, calibration: Calibration) -> Plan:
        problem.progress.stage("statistics, ranking and sensitivity of every group")
        used, spared = _divide(calibration, self.probes)
        settings = self.compensation or Compensation()
        curves = loss_curves(problem.channels, used, settings, self.probes if self.weights != "plain" else 0, problem.seed)
        return self.allocate(problem, curves, used, spared)

    def allocate(self, problem: Problem, curves: Mapping[str, Curve], used: Calibration, spared: Calibration) -> Plan:
        """Widths by the loss curves.

        Args:
            problem: With the budget.
            curves: Of every group that may be pruned.
            used: Images to compensate on, where several weightings are compared.
            spared: Images to compare them by.

        Raises:
            BudgetError: The budget cannot be met; the closest that can is said.
        """
        curves = {name: curve for name, curve in curves.items() if self.streams or not is_stream(problem.channels, name)}
        if not curves:
            raise BudgetError("CaP: no group of this network can be compensated; `--method magnitude` needs no repair")
        cost = self._cost(problem)
        scores = {name: curve.ranking.scores for name, curve in curves.items()}
        names = list(_POWERS) if self.weights == "best" else [self.weights]
        paths = {name: _path(problem, curves, _POWERS[name], cost) for name in names}
        best = names[0]
        if len(names) > 1:
            found = {name: self._distance(problem, _candidate(problem, scores, path), used, spared) for name, path in paths.items()}
            best = min(found, key=found.__getitem__)
            logger.info("CaP: weights %s", ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            problem.progress.stage(f"losses of groups compared by weights `{best}` keep the outputs nearest")
        return resolve(problem, scores, fitting(problem, scores, paths[best]))

    def _cost(self, problem: Problem) -> "_Cost":
        if "latency" not in problem.limits:
            return _Cost(problem)
        problem.progress.stage(f"latency model: {self.engines} engines")
        legal = [widths(group, problem.target.align) for group in problem.channels.groups]
        try:
            model = train_latency_model(
                problem.channels, legal, problem.target, self.engines, problem.seed, progress=problem.progress
            )
        except BackendError as error:
            logger.warning("CaP: no latency model for this target (%s); notches are chosen by MACs, then measured", error)
            return _Cost(problem)
        return _Cost(problem, model.predict)

    def _distance(self, problem: Problem, plan: Plan, used: Calibration, spared: Calibration) -> float:
        """How far the outputs of a plan's repaired network are from the original's, on images that took no part."""
        channels = problem.channels
        settings = self.compensation or Compensation()
        quick = replace(settings, images=min(settings.images, 512), positions=min(settings.positions, 12))
        graph = RemoveChannels(plan, channels)(channels.graph).graph.eval()
        if self.compensation is not None:
            graph = Compensate(channels, plan, used, quick, problem.seed)(graph).graph
        outputs = ([log_probabilities(y) for y in Prefix(g, spared, Shelf(1 << 62)).finish()] for g in (channels.graph, graph))
        return divergence(*outputs)

    # bottom-up

    def _bottom_up(self, problem: Problem) -> Plan:
        assert problem.calibration is not None
        ranked, _ = rankable(problem.channels)
        names = tuple(name for name in ranked if self.streams or not is_stream(problem.channels, name))
        search = BottomUp(
            problem,
            problem.calibration,
            _labelled(problem, self.holdout),
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
            low, high, best = (middle, high, plan) if _meets(problem, plan) else (low, middle, best)
        return best


class _Cost:
    """What a notch saves is counted in: the budgets that are not met yet, each as a share of its limit."""

    def __init__(self, problem: Problem, latency: object = None) -> None:
        self._problem, self._latency = problem, latency

    def __call__(self, rows: Rows) -> NDArray[np.float64]:
        """Of structures; see `steepest`."""
        costs = self._problem.channels.costs(rows)
        found = {"macs": costs.macs, "params": costs.params, "memory": costs.memory_bytes}
        if callable(self._latency):
            return np.asarray(self._latency(rows), dtype=np.float64)
        limits = {name: limit for name, limit in self._problem.limits.items() if name in found}
        missed = {name: limit for name, limit in limits.items() if found[name][0] > limit} or limits
        if not missed:
            return np.asarray(costs.macs, dtype=np.float64)
        return np.asarray(sum(found[name] / limit for name, limit in missed.items()), dtype=np.float64)


def is_stream(channels: ChannelGraph, name: str) -> bool:
    """Whether several layers that mix channels make a group: the channels of a residual stream."""
    group = next(g for g in channels.groups if g.name == name)
    graph = channels.graph
    modules = [graph.get_submodule(layer) for layer in group.layers if layer in dict(graph.named_modules())]
    return len([m for m in modules if getattr(m, "groups", 1) == 1]) > 1


def _path(problem: Problem, curves: Mapping[str, Curve], power: float, cost: _Cost) -> Rows:
    options, losses = {}, {}
    for k, group in enumerate(problem.channels.groups):
        if group.name in curves:
            curve = curves[group.name]
            options[k] = widths(group, problem.target.align)
            losses[k] = curve.ranking.loss[list(options[k])] * max(curve.sensitivity, 1e-12) ** power
    return steepest([group.size for group in problem.channels.groups], options, losses, cost)


def _candidate(problem: Problem, scores: Mapping[str, NDArray[np.float64]], path: Rows) -> Plan:
    """A structure of a path near the budget, without measuring anything: a latency counts as its share of the MACs."""
    limits = dict(problem.limits)
    if "latency" in limits:
        full = float(problem.channels.costs(path[:1]).macs[0])
        limits["macs"] = min(limits.get("macs", full), limits.pop("latency") * full)
    near = replace(problem, limits=limits)
    return resolve(near, scores, fitting(near, scores, path))


def _divide(calibration: Calibration, spare: int) -> tuple[Calibration, Calibration]:
    """Images to fit on, and images to judge by: at most `spare`, and a quarter of them where there are few."""
    spared = calibration.first(min(spare, max(calibration.images // 4, 1)))
    return calibration.after(spared.images), spared


def _labelled(problem: Problem, images: int) -> Holdout:
    """The first images of the hold-out with their labels."""
    pairs = []
    for k, batch in enumerate(problem.validate):
        pairs.append(pair_of(batch, k))
        if sum(len(y) for _, y in pairs) >= images:
            break
    if not pairs:
        raise DataError("the bottom-up search looks at accuracies: pass labelled images of a hold-out as validate=…")
    inputs = Calibration.read([x for x, _ in pairs], problem.channels.graph, images)
    return Holdout(inputs, tuple(y[: len(own[0])] for (_, y), own in zip(pairs, inputs.batches, strict=True)))


def _meets(problem: Problem, plan: Plan) -> bool:
    costs = problem.costs(problem.channels.structure(plan))
    if any(costs[name] > limit for name, limit in problem.limits.items() if name in costs):
        return False
    return "latency" not in problem.limits or problem.measure(plan).ratio <= problem.limits["latency"]


def _found(problem: Problem, plan: Plan) -> str:
    costs = problem.costs(problem.channels.structure(plan))
    said = [f"{name} {costs[name]:,.0f} (asked: {limit:,.0f})" for name, limit in problem.limits.items() if name in costs]
    if "latency" in problem.limits:
        said.append(f"latency {problem.measure(plan).ratio:.3f} of the original (asked: {problem.limits['latency']:.3f})")
    return "the closest has " + ", ".join(said)
