"""`Policy`: widths, ranks and reads by loss curves, notch after notch where it costs the least loss for what it saves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.losses.streams import WidthsAndReads, inputs_ranking, is_stream, paying, widths_of_inputs
from compressor.methods.structures.legal import widths
from compressor.methods.structures.paths import COSTS, Rows, fitting, give_back, steepest
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.readers import Reader
from compressor.passes.fitting.losses import Curve
from compressor.runtime.latency_model.model import LatencyModel
from compressor.values.plan import Plan

RANK_PRICE = 0.5
"""What the loss of a rank counts for beside that of a channel; `CaP` begins with it where it compares weightings."""

SAVED = {"milliseconds": (1.0, 0.0), "both": (0.5, 0.5), "macs": (0.0, 1.0)}
"""What a notch saves where latency is limited: shares of the milliseconds of a latency model, and of the MACs.

Milliseconds fall by steps, and where two groups meet in a layer often only once both have taken one: notch by notch, MACs
may lead to the better network of the same latency."""

POWERS = {"plain": 0.0, "mixed": 0.5, "sensitivity": 1.0}
"""The power of the sensitivity that losses are weighted by."""


@dataclass(frozen=True)
class Weighting:
    """How losses compare; see `CaP`."""

    streams: str
    weights: str
    price: float | None = RANK_PRICE
    saved: str = "milliseconds"

    def __str__(self) -> str:
        """For the log."""
        ranks = {None: ", channels alone", RANK_PRICE: ""}.get(self.price, f", ranks at {self.price} of their loss")
        saved = "" if self.saved == "milliseconds" else f", saving {self.saved}"
        return f"streams {self.streams}, weights {self.weights}{ranks}{saved}"


class Policy:
    """The structures that a policy for streams allows, with their losses and costs."""

    def __init__(self, problem: Problem, curves: Mapping[str, Curve], streams: str, latency: LatencyModel | None) -> None:
        channels = problem.channels
        self.problem, self._latency = problem, latency
        self._curves = {name: c for name, c in curves.items() if streams == "group" or not is_stream(channels, name)}
        self._scores = {name: curve.ranking.scores for name, curve in self._curves.items()}
        self.readers = [r for r in paying(problem) if _stream_of(channels, r) in curves] if streams == "gather" else []
        self._paths: dict[Weighting, tuple[WidthsAndReads, Rows]] = {}
        self._rankings, self._stream = {}, {}
        for reader in self.readers:
            stream = curves[_stream_of(channels, reader)]
            own = stream.by_reader.get(reader.node, stream.ranking)
            self._rankings[reader.node], self._stream[reader.node] = inputs_ranking(channels, reader, own), stream

    @property
    def ways(self) -> tuple[str, ...]:
        """In what savings can be counted; see `SAVED`."""
        return ("milliseconds",) if self._latency is None else tuple(SAVED)

    def decide(self, weighting: Weighting) -> Plan:
        """The plan that meets the budget.

        Raises:
            BudgetError: No structure on the path meets it.
        """
        space, path = self._path(weighting)
        return fitting(space, path, lambda rows: self._costs_of(space, rows))

    def near(self, weighting: Weighting) -> Plan:
        """A plan near the budget, without measuring anything: a latency is that of the model, or its share of the MACs.

        Raises:
            BudgetError: No structure on the path meets it.
        """
        if "latency" not in self.problem.limits:
            return self.decide(weighting)
        space, path = self._path(weighting)
        limit = self.problem.limits["latency"] * self._costs_of(space, path[:1])[0]

        def within(rows: Rows) -> NDArray[np.bool_]:
            return np.asarray(space.within(rows) & (self._costs_of(space, rows) <= limit))

        good = within(path)
        if not good.any():
            raise BudgetError("the budget cannot be met by these groups and ranks alone")
        return space.plan(give_back(path, int(np.argmax(good)), within))

    def _path(self, weighting: Weighting) -> tuple[WidthsAndReads, Rows]:
        """The structures from the whole network down."""
        if weighting in self._paths:
            return self._paths[weighting]
        power = POWERS[weighting.weights]
        problem = self.problem
        space = WidthsAndReads(problem, self._scores, self.readers, self._rankings)
        align = problem.target.align
        options, losses = {}, {}
        for k, group in enumerate(problem.channels.groups):
            own = weighting.price if isinstance(group, RankAxis) else 1.0
            if group.name in self._curves and own is not None:
                curve = self._curves[group.name]
                options[k] = list(widths(group, align))
                losses[k] = own * curve.ranking.loss[options[k]] * max(curve.sensitivity, 1e-12) ** power
        for k, reader in enumerate(self.readers, len(problem.channels.groups)):
            ranking = self._rankings[reader.node]
            options[k] = widths_of_inputs(len(ranking.order), align)
            losses[k] = ranking.loss[options[k]] * max(self._stream[reader.node].sensitivity, 1e-12) ** power
        start = [group.size for group in problem.channels.groups] + space.inputs
        path = steepest(start, options, losses, lambda rows: self._saved_of(space, rows, weighting.saved))
        return self._paths.setdefault(weighting, (space, path))

    def _saved_of(self, space: WidthsAndReads, rows: Rows, saved: str) -> NDArray[np.float64]:
        """What a notch is to save: that of the budget, or of a latency's with MACs in it, as shares of the first structure's."""
        costs = self._costs_of(space, rows)
        if self._latency is None or saved == "milliseconds":
            return costs
        macs = space.costs(rows, ("macs",))["macs"]
        milliseconds, others = SAVED[saved]
        return np.asarray(milliseconds * costs / costs[0] + others * macs / macs[0], dtype=np.float64)

    def _costs_of(self, space: WidthsAndReads, rows: Rows) -> NDArray[np.float64]:
        """What is limited: milliseconds, or the budgets that are not met yet, as shares of their limits."""
        if self._latency is not None:
            groups = len(space.problem.channels.groups)
            plain = self._latency.predict(rows[:, :groups])
            whole = space.problem.channels.costs.macs(rows[:, :groups])
            macs = space.costs(rows, ("macs",))["macs"]
            return np.asarray(plain * macs / whole, dtype=np.float64)  # a gather saves in proportion, it was found to pay
        limits = {name: limit for name, limit in space.problem.limits.items() if name in COSTS} or {"macs": 1.0}
        found = space.costs(rows, limits)
        missed = {name: limit for name, limit in limits.items() if found[name][0] > limit} or limits
        return np.asarray(sum(found[name] / limit for name, limit in missed.items()), dtype=np.float64)


def _stream_of(channels: ChannelGraph, reader: Reader) -> str:
    assert reader.inputs is not None
    return channels.groups[int(channels.grouping.group_of[reader.inputs[0]])].name


def decided(problem: Problem, policies: Mapping[str, Policy], order: Sequence[Weighting]) -> Plan:
    """The plan of the first weighting by which the budget is met, as measured."""
    for choice in order:
        problem.progress.stage(f"widths by loss curves: {choice}")
        try:
            return policies[choice.streams].decide(choice)
        except BudgetError as error:
            problem.progress.stage(f"{choice}: {error}")
            last = error
    raise last
