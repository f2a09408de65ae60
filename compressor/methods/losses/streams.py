"""What becomes of residual streams: channels that many layers read and add to.

* `group`: the stream is narrowed as a coupled group, for all that read it at once.
* `gather`: the stream stays as wide as it is, and each of its readers reads a part of its own, through a gather. The
  saving in the layer has to pay for the copy, which is measured: for every kind of reader once, all of that kind at half
  their inputs, as a whole engine on the target.
* `inside`: streams are left alone; only channels inside blocks go.
"""

import logging
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.methods.base import Problem
from compressor.methods.structures.paths import COSTS, Rows, Widths
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader
from compressor.passes.criteria import Scores
from compressor.passes.fitting.losses import rankable
from compressor.passes.fitting.ranking import Ranking
from compressor.passes.layers.product import Product
from compressor.passes.tracing.shapes import shapes_of
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)

POLICIES = ("group", "inside", "gather")


def is_stream(channels: ChannelGraph, name: str) -> bool:
    """Whether several layers that mix channels make a group: the channels of a residual stream."""
    group = next(g for g in channels.groups if g.name == name)
    modules = dict(channels.graph.named_modules())
    makers = [modules[layer] for layer in group.layers if layer in modules]
    return len([maker for maker in makers if getattr(maker, "groups", 1) == 1]) > 1


def stream_readers(channels: ChannelGraph) -> dict[str, list[Reader]]:
    """Stream -> layers that could read a part of it: all their inputs are its channels, one each, in one block."""
    found: dict[str, list[Reader]] = {}
    for name, readers in rankable(channels)[0].items():
        if not is_stream(channels, name):
            continue
        index = next(k for k, group in enumerate(channels.groups) if group.name == name)
        for reader in readers:
            product = Product(channels.graph.get_submodule(reader.layer))
            own = np.zeros(0) if reader.inputs is None else channels.grouping.group_of[reader.inputs]
            if product.blocks == 1 and len(own) and (own == index).all() and _one_each(channels, reader):
                found.setdefault(name, []).append(reader)
    return found


def _one_each(channels: ChannelGraph, reader: Reader) -> bool:
    """Whether every input of a reader is a unit of its own; behind a flatten, a unit is many inputs."""
    units = [] if reader.inputs is None else channels.grouping.unit_of[reader.inputs].tolist()
    return len(set(units)) == len(units)


def paying(problem: Problem) -> list[Reader]:
    """The readers of streams for which a gather was measured to pay on the target.

    Readers that are built alike and see the same shape are judged together.
    """
    channels = problem.channels
    nodes = {node.name: node for node in channels.graph.graph.nodes}
    kinds: dict[str, list[Reader]] = {}
    for reader in [reader for own in stream_readers(channels).values() for reader in own]:
        kind = f"{channels.graph.get_submodule(reader.layer)} on {shapes_of(nodes[reader.node].all_input_nodes[0])[0][1:]}"
        kinds.setdefault(kind, []).append(reader)
    found: list[Reader] = []
    for kind, readers in kinds.items():
        reads = {}
        for reader in readers:
            inputs = Product(channels.graph.get_submodule(reader.layer)).inputs
            reads[reader.layer] = range(max(inputs // 2, 1))
        trial = problem.measure(Plan.keep({}, channels.digest, reads))
        pays = trial.measurement.interval_ms[1] < trial.original.interval_ms[0]  # by more than the noise
        problem.progress.stage(
            f"half the inputs through a gather, {len(readers)} readers of a stream: {trial.ratio:.3f} of the latency, "
            f"{'worth it' if pays else 'not worth it'} ({kind})"
        )
        found += readers if pays else []
    return found


class WidthsAndReads(Widths):
    """Structures with further columns: how many inputs each of some readers reads.

    Args:
        problem: The network and its limits.
        scores: Group name -> score per unit.
        readers: The readers.
        rankings: Node of a reader -> ranking of its inputs.
    """

    def __init__(
        self, problem: Problem, scores: Mapping[str, Scores], readers: Sequence[Reader], rankings: Mapping[str, Ranking]
    ) -> None:
        super().__init__(problem, scores)
        self._readers, self._rankings = readers, rankings
        self._groups = len(problem.channels.groups)
        costs = problem.channels.costs
        self._terms = [[k for k, layer in enumerate(costs.layers) if layer == reader.layer] for reader in readers]
        self.inputs = [len(rankings[reader.node].order) for reader in readers]

    def costs(self, rows: Rows, names: Collection[str] = COSTS) -> dict[str, NDArray[np.float64]]:
        """See `Widths`; parameters and bytes are counted as if nothing were gathered, which is never too little."""
        found = super().costs(rows[:, : self._groups], names)
        if not self._readers:
            return found
        terms = self.problem.channels.costs.by_term(rows[:, : self._groups])
        for column, (own, inputs) in enumerate(zip(self._terms, self.inputs, strict=True)):
            found["macs"] -= terms[:, own].sum(axis=1) * (1 - rows[:, self._groups + column] / inputs)
        return found

    def plan(self, row: Rows) -> Plan:
        """See `Widths`."""
        plain = super().plan(row[: self._groups])
        reads = {}
        for reader, count in zip(self._readers, row[self._groups :].tolist(), strict=True):
            order = self._rankings[reader.node].order
            if count < len(order):
                reads[reader.layer] = order[:count].tolist()
        return Plan.keep(dict(plain.kept), plain.model, reads, plain.factors)


def widths_of_inputs(count: int, align: int) -> list[int]:
    """How many inputs a reader may read: multiples of the target's alignment, and all of them."""
    step = align
    while step * 2 > count and step > 1:
        step //= 2
    return [*range(step, count, step), count]


def inputs_ranking(channels: ChannelGraph, reader: Reader, ranking: Ranking) -> Ranking:
    """A ranking of a stream's units as one of a reader's input channels, each of which is one unit."""
    assert reader.inputs is not None
    unit = channels.grouping.unit_of[reader.inputs]
    position = np.full(len(ranking.order), -1, dtype=np.int64)
    position[unit] = np.arange(len(unit))
    order = position[ranking.order]
    read = order >= 0  # a reader may see a part of the stream only, behind a split
    return Ranking(order[read], np.concatenate([ranking.loss[:1], ranking.loss[1:][read]]))
