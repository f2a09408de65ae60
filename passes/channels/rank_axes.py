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

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.costs import CostModel, Costs
from compressor.passes.channels.layer_costs import Layer
from compressor.passes.labels.groups import ChannelGroup, Grouping
from compressor.passes.labels.labeler import IntArray, Labeler
from compressor.passes.layers.factorizable import factorizable, sizes_of
from compressor.passes.layers.forms import FORMS, Sizes
from compressor.passes.layers.product import Product, is_product
from compressor.values.plan import Factorization, Structure

_UNIT = Sizes(1, 1, ())  # one element
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
        self._groups = len(grouping.groups)
        # MACs and elements are those of the layer, dense I O, less those of its sequence, r (a I + b O): all layers at once
        self._macs, self._elements = (
            np.array([own[k] for own in map(_slopes, layers)], dtype=np.int64).reshape(-1, 3).T for k in (0, 1)
        )
        self._bytes = np.array([layer.dense(1, _UNIT).memory_bytes for layer in layers], dtype=np.int64)
        self._kernels = np.array([Product(layer.module).kernel for layer in layers], dtype=np.int64)
        sides = [(f"{layer.name}.weight", int(Product(layer.module).transposed)) for layer in layers]
        self._outputs = self._sides(sides)
        self._inputs = self._sides([(name, 1 - swapped) for name, swapped in sides])

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
        return self._built(rows)[0]

    def _saved(self, rows: NDArray[np.int64]) -> Costs:
        _, macs, elements = self._built(rows)
        return Costs(macs.sum(axis=1), elements.sum(axis=1), (elements * self._bytes).sum(axis=1))

    def _built(self, rows: NDArray[np.int64]) -> tuple[IntArray, IntArray, IntArray]:
        """The rank that each layer is built with, and the MACs and elements that this saves; (structures, axes) each."""
        lengths, asked = self._lengths(rows), rows[:, self._groups :]
        outputs, inputs = (np.where(columns >= 0, lengths[:, columns], fixed) for columns, fixed in (self._outputs, self._inputs))
        macs, elements = (
            dense * inputs * outputs - asked * (by_input * inputs + by_output * outputs)
            for dense, by_input, by_output in (self._macs, self._elements)
        )
        built = (elements > 0) & (macs > 0) & (asked <= np.minimum(outputs, inputs * self._kernels))
        return np.where(built, asked, 0), np.where(built, macs, 0), np.where(built, elements, 0)

    def _sides(self, sides: Sequence[tuple[str, int]]) -> tuple[IntArray, IntArray]:
        """Where the lengths hold sides of weights (-1: nowhere), and what these are where no structure changes them."""
        columns = [self._axes.get(side, -1) for side in sides]
        return np.array(columns, dtype=np.int64), np.array([self._shapes[name][axis] for name, axis in sides], dtype=np.int64)

    def _lengths(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        return super()._lengths(widths[:, : self._groups])


def _slopes(layer: Layer) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """MACs and elements: of a dense layer per input and output, of its sequence per rank and input, and per rank and output."""
    form, kernel = FORMS["svd"], sizes_of(layer.module).kernel
    dense = layer.dense(1, Sizes(1, 1, kernel))
    one, two = (layer.factorized(1, sizes, form.stages(sizes, (1,))) for sizes in (Sizes(1, 1, kernel), Sizes(1, 2, kernel)))
    more = two - one  # for an input
    return (dense.macs, more.macs, one.macs - more.macs), (dense.elements, more.elements, one.elements - more.elements)


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
        return cls(channels.graph, channels.walk, channels.grouping, channels.digest, tuple(axes))

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
        return ChannelGraph(self.graph, self.walk, self.grouping, self.digest)

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
