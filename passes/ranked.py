"""`RankedChannels`: channels and ranks of one network as the axes of one search space.

A structure is a row of integers: the width of every channel group, then a rank for every layer that could become a sequence
(`svd`). The full rank stands for the plain layer; ranks between it and the largest that saves something are not legal. As a layer
narrows, so does what a rank saves: where it no longer does, the layer is plain, in costs, plans and engines alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import fx

from compressor.passes.channels import ChannelGraph
from compressor.passes.costs import CostModel, Costs
from compressor.passes.factorize_conv import factorizable, sizes_of
from compressor.passes.forms import FORMS, Sizes
from compressor.passes.groups import ChannelGroup, Grouping
from compressor.passes.labels import IntArray, Labeler
from compressor.passes.layer_costs import Layer
from compressor.passes.products import Product, is_product
from compressor.plan import Factorization, Structure

_LEVELS = 12  # ranks of one layer that a search may choose, the plain layer not counted


@dataclass(frozen=True)
class RankAxis(ChannelGroup):
    """The singular values of one layer, as a group of which the smallest go first.

    Attributes, besides those of `ChannelGroup`:
        layer: The layer.
        largest: The largest rank that saves anything in the whole network.
    """

    layer: str = ""
    largest: int = 0

    def legal(self, align: int) -> tuple[int, ...]:
        """Ranks that a search may choose, ascending; the last is the plain layer."""
        step = -(-self.largest // (_LEVELS * align)) * align
        while step * 2 > self.largest and step > 1:
            step //= 2
        return (*range(step, self.largest + 1, step), self.size)


class RankedCosts(CostModel):
    """Costs as a function of widths and ranks.

    Args:
        gm: The traced graph.
        labeler: The facts of its walk.
        grouping: Its groups.
        layers: The layers of the rank axes.
    """

    def __init__(self, gm: fx.GraphModule, labeler: Labeler, grouping: Grouping, layers: Sequence[Layer]) -> None:
        super().__init__(gm, labeler, grouping)
        self._groups, self._ranked = len(grouping.groups), tuple(layers)

    def __call__(self, widths: NDArray[np.int64] | Sequence[Sequence[int]]) -> Costs:
        """Costs of structures, (structures, groups and ranks)."""
        rows = np.asarray(widths, dtype=np.int64)
        found, saved = super().__call__(rows), self._saved(rows)
        return Costs(found.macs - saved.macs, found.params - saved.params, found.memory_bytes - saved.memory_bytes)

    def macs(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `CostModel`."""
        return np.asarray(super().macs(widths) - self._saved(widths).macs)

    def ranks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(structures, axes): the rank that each layer is built with; 0 for a plain layer."""
        lengths = self._lengths(rows)
        columns = [self._one(layer, rows, lengths, k)[0] for k, layer in enumerate(self._ranked)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), dtype=np.int64)

    def _saved(self, rows: NDArray[np.int64]) -> Costs:
        macs = elements = memory = np.zeros(len(rows), dtype=np.int64)
        lengths = self._lengths(rows)
        for k, layer in enumerate(self._ranked):
            _, own = self._one(layer, rows, lengths, k)
            macs, elements, memory = macs + own.macs, elements + own.params, memory + own.memory_bytes
        return Costs(macs, elements, memory)

    def _one(self, layer: Layer, rows: NDArray[np.int64], lengths: NDArray[np.int64], axis: int) -> tuple[IntArray, Costs]:
        """Of one layer: the rank that is built, and what it saves."""
        first, second = (self._along(f"{layer.name}.weight", k, lengths) for k in (0, 1))
        outputs, inputs = (second, first) if Product(layer.module).transposed else (first, second)
        sizes = Sizes(outputs, inputs, sizes_of(layer.module).kernel)  # type: ignore[arg-type]  # arrays, elementwise
        asked = rows[:, self._groups + axis]
        dense = layer.dense(1, sizes)
        sequence = layer.factorized(1, sizes, FORMS["svd"].stages(sizes, (asked,)))  # type: ignore[arg-type]
        most = np.minimum(outputs, inputs * Product(layer.module).kernel)
        more = dense - sequence
        built = (np.asarray(more.elements) > 0) & (np.asarray(more.macs) > 0) & (asked <= most)
        saved = Costs(*(np.where(built, own, 0) for own in (more.macs, more.elements, more.memory_bytes)))
        return np.where(built, asked, 0), saved

    def _along(self, name: str, axis: int, lengths: NDArray[np.int64]) -> IntArray:
        if (name, axis) in self._axes:
            return np.asarray(lengths[:, self._axes[name, axis]])
        return np.full(len(lengths), self._shapes[name][axis], dtype=np.int64)

    def _lengths(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        return super()._lengths(widths[:, : self._groups])


def axes_of(channels: ChannelGraph) -> tuple[RankAxis, ...]:
    """The rank axes of a network; none where its channels alone are searched."""
    return channels.axes if isinstance(channels, RankedChannels) else ()


@dataclass(frozen=True, eq=False)
class RankedChannels(ChannelGraph):
    """A network's channel groups, and the ranks of its layers behind them.

    Attributes, besides those of `ChannelGraph`:
        axes: Of the layers that may become sequences.
    """

    axes: tuple[RankAxis, ...] = ()

    @classmethod
    def of(cls, channels: ChannelGraph) -> "RankedChannels":
        """With an axis for every convolution of one block but the first, and where a sequence can save anything."""
        graph = channels.graph
        able = factorizable(graph, FORMS["svd"])
        names = [str(node.target) for node in graph.graph.nodes if is_product(graph, node)]
        axes = []
        for name in names[1:]:
            product = Product(graph.get_submodule(name))
            if product.channel_axis != 1 or product.blocks > 1 or able[name] is not None:
                continue
            sizes = sizes_of(product.module)
            (full,) = FORMS["svd"].full(sizes)
            largest = (sizes.elements - 1) // (product.columns + product.outputs)
            if 1 <= largest < full:
                cells = (tuple(range(full)),)
                axes.append(RankAxis(f"{name}:svd:0", full, (name,), (name,), None, cells, 1, (), 1, name, largest))
        return cls(channels.graph, channels.walk, channels.grouping, tuple(axes))

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups, then rank axes."""
        return (*self.grouping.groups, *self.axes)

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The channel groups that may be narrowed; rank axes are not among them."""
        return self.plain.free

    @cached_property
    def plain(self) -> ChannelGraph:
        """The channel groups alone."""
        return ChannelGraph(self.graph, self.walk, self.grouping)

    @cached_property
    def costs(self) -> RankedCosts:
        """Costs as a function of widths and ranks."""
        return RankedCosts(self.graph, self.walk.labeler, self.grouping, [Layer.of(self.plain, axis.layer) for axis in self.axes])

    def costs_of(self, structure: Structure) -> Costs:
        """See `ChannelGraph`."""
        return self.plain.costs_of(structure)

    def widths(self, structures: Sequence[Structure]) -> NDArray[np.int64]:
        """Structures as rows; a layer without a rank has its full one."""
        ranks = [dict(structure.ranks) for structure in structures]
        own = np.array([[row.get(axis.name, axis.size) for axis in self.axes] for row in ranks], dtype=np.int64)
        return np.concatenate([self.plain.widths(structures), own.reshape(len(structures), len(self.axes))], axis=1)

    def structure_of(self, row: NDArray[np.int64]) -> Structure:
        """The structure of a row; ranks that would save nothing are left out."""
        found = self.plain.structure_of(row[: len(self.grouping.groups)])
        ranks = self.costs.ranks(row[None])[0].tolist()
        factors = [Factorization(axis.layer, "svd", (rank,)) for axis, rank in zip(self.axes, ranks, strict=True) if rank]
        return Structure(found.widths, tuple(pair for one in factors for pair in one.axes))
