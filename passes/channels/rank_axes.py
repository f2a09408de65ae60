"""Ranks of layers as axes of a search space: which there are, and what structures cost that have them.

The full rank stands for the plain layer; ranks between it and the largest that saves something are not legal. As a layer
narrows, so does what a rank saves: where it no longer does, the layer is plain, in costs, plans and engines alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.branches import Branch
from compressor.passes.channels.costs import CostModel, Costs
from compressor.passes.channels.layer_costs import Layer
from compressor.passes.labels.groups import ChannelGroup, Grouping
from compressor.passes.labels.labeler import IntArray, Labeler
from compressor.passes.layers.factorizable import factorizable, sizes_of
from compressor.passes.layers.forms import FORMS, Sizes
from compressor.passes.layers.product import Product, is_product

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
    """Costs as a function of widths, ranks, and of which branches are there.

    Args:
        gm: The traced graph.
        labeler: The facts of its walk.
        grouping: Its groups.
        layers: The layers of the rank axes.
        branches: Those that may go; their columns are behind those of the ranks.
    """

    def __init__(
        self, gm: fx.GraphModule, labeler: Labeler, grouping: Grouping, layers: Sequence[Layer], branches: Sequence[Branch] = ()
    ) -> None:
        super().__init__(gm, labeler, grouping, branches)
        self._groups, self._layers = len(grouping.groups), len(layers)
        holds = [[layer.name in branch.layers for branch in branches] for layer in layers]
        self._holds = np.array(holds, dtype=bool).reshape(len(layers), len(branches))
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
        lengths, asked = self._lengths(rows), rows[:, self._groups : self._groups + self._layers]
        outputs, inputs = (np.where(columns >= 0, lengths[:, columns], fixed) for columns, fixed in (self._outputs, self._inputs))
        macs, elements = (
            dense * inputs * outputs - asked * (by_input * inputs + by_output * outputs)
            for dense, by_input, by_output in (self._macs, self._elements)
        )
        built = (elements > 0) & (macs > 0) & (asked <= np.minimum(outputs, inputs * self._kernels))
        gone = rows[:, self._groups + self._layers :] == 0  # (structures, branches)
        if gone.any():
            built &= ~(gone[:, None, :] & self._holds[None, :, : gone.shape[1]]).any(axis=2)
        return np.where(built, asked, 0), np.where(built, macs, 0), np.where(built, elements, 0)

    def _sides(self, sides: Sequence[tuple[str, int]]) -> tuple[IntArray, IntArray]:
        """Where the lengths hold sides of weights (-1: nowhere), and what these are where no structure changes them."""
        columns = [self._axes.get(side, -1) for side in sides]
        return np.array(columns, dtype=np.int64), np.array([self._shapes[name][axis] for name, axis in sides], dtype=np.int64)

    def _lengths(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        return super()._lengths(np.concatenate([widths[:, : self._groups], widths[:, self._groups + self._layers :]], axis=1))


def _slopes(layer: Layer) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """MACs and elements: of a dense layer per input and output, of its sequence per rank and input, and per rank and output."""
    form, kernel = FORMS["svd"], sizes_of(layer.module).kernel
    dense = layer.dense(1, Sizes(1, 1, kernel))
    one, two = (layer.factorized(1, sizes, form.stages(sizes, (1,))) for sizes in (Sizes(1, 1, kernel), Sizes(1, 2, kernel)))
    more = two - one  # for an input
    return (dense.macs, more.macs, one.macs - more.macs), (dense.elements, more.elements, one.elements - more.elements)


def rank_axes_of(channels: ChannelGraph) -> tuple[RankAxis, ...]:
    """An axis for every convolution of one block but the first, and where a sequence can save anything."""
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
    return tuple(axes)
