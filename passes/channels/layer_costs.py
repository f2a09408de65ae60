"""What a layer costs when it reads a part of its inputs, or is factorized: the exact MACs and elements of what is built."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.errors import PlanError
from compressor.passes.layers.factorizable import form_of
from compressor.passes.layers.forms import Sizes, StageSizes
from compressor.passes.layers.product import Conv, Transposed, is_product
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.tracing.trace import BATCH
from compressor.values.plan import Factorization, Structure

if TYPE_CHECKING:
    from compressor.passes.channels.analyze import ChannelGraph


@dataclass(frozen=True)
class LayerCosts:
    """Of one layer in one structure.

    Attributes:
        macs: Multiply-accumulates for one sample.
        elements: Of its weights.
        memory_bytes: Of its weights.
    """

    macs: int
    elements: int
    memory_bytes: int

    def __sub__(self, other: "LayerCosts") -> "LayerCosts":
        """What it costs more."""
        return LayerCosts(self.macs - other.macs, self.elements - other.elements, self.memory_bytes - other.memory_bytes)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as costs see it.

    Attributes:
        name: Qualified.
        module: The layer.
        before: Positions along every axis of its input that is neither batch nor channels.
        after: The same of its output.
        repeats: How many of its inputs are one sample: frames or windows that a view has folded into the batch.
    """

    name: str
    module: nn.Module
    before: tuple[int, ...]
    after: tuple[int, ...]
    repeats: int = 1

    @classmethod
    def of(cls, channels: "ChannelGraph", name: str) -> "Layer":
        """A layer of a graph.

        Raises:
            PlanError: There is none of this name.
        """
        for node in channels.graph.graph.nodes:
            if str(node.target) == name and is_product(channels.graph, node):
                (before, *_), (after, *_) = shapes_of(node.all_input_nodes[0]), shapes_of(node)
                module = channels.graph.get_submodule(name)
                spatial = slice(2, None) if isinstance(module, Conv) else slice(1, -1)
                repeats = max(after[0] // int(channels.graph.meta.get(BATCH, 1)), 1) if len(after) > 1 else 1
                return cls(name, module, before[spatial], after[spatial], repeats)
        raise PlanError(f"there is no layer `{name}` that could be factorized or read a part of its inputs")

    def sizes(self, channels: "ChannelGraph", row: NDArray[np.int64]) -> tuple[int, Sizes]:
        """Blocks, and the sizes of each, in a structure (1, groups)."""
        first, second = (channels.costs.axis_length(f"{self.name}.weight", axis, row) for axis in (0, 1))
        if not isinstance(self.module, Conv):
            return 1, Sizes(first, second, ())
        whole = self.module
        groups = whole.groups
        kernel = tuple(int(k) for k in whole.kernel_size)
        if isinstance(whole, Transposed):
            blocks = first if groups == whole.in_channels > 1 else groups
            return blocks, Sizes(second, first // blocks, kernel)
        blocks = first // (whole.out_channels // groups) if groups == whole.in_channels > 1 else groups
        return blocks, Sizes(first // blocks, second, kernel)

    def dense(self, blocks: int, sizes: Sizes) -> LayerCosts:
        """As it is."""
        elements = blocks * sizes.elements
        return LayerCosts(elements * self.positions, elements, elements * self._element_size)

    def factorized(self, blocks: int, sizes: Sizes, stages: Sequence[StageSizes]) -> LayerCosts:
        """As a sequence."""
        macs = elements = 0
        done: set[int] = set()
        for stage in stages:
            own = blocks * stage.elements(sizes.kernel)
            elements += own
            macs += own * self._positions(done if self._transposed and stage.axes else done | set(stage.axes))
            done |= set(stage.axes)
        return LayerCosts(macs, elements, elements * self._element_size)

    def saves(self, blocks: int, sizes: Sizes, stages: Sequence[StageSizes]) -> bool:
        """Whether a sequence has fewer MACs and fewer weights than the layer."""
        dense, sequence = self.dense(blocks, sizes), self.factorized(blocks, sizes, stages)
        return sequence.macs < dense.macs and sequence.elements < dense.elements

    @property
    def _element_size(self) -> int:
        return cast(Tensor, self.module.weight).element_size()

    @property
    def positions(self) -> int:
        """Where the weight is applied: MACs per element."""
        return self._positions(self._all)

    @property
    def _transposed(self) -> bool:
        return isinstance(self.module, Transposed)

    @property
    def _all(self) -> set[int]:
        return set() if self._transposed else set(range(len(self.after)))

    def _positions(self, done: set[int]) -> int:
        """Where the axes in `done` have been run over already."""
        each = math.prod(n if axis in done else m for axis, (m, n) in enumerate(zip(self.before, self.after, strict=True)))
        return self.repeats * each


def added(channels: "ChannelGraph", structure: Structure, row: NDArray[np.int64]) -> dict[str, LayerCosts]:
    """What the reads and ranks of a structure cost more (less, as a rule) than its widths alone, by layer.

    Args:
        channels: The analysis of the network.
        structure: The structure.
        row: (1, groups): its widths.

    Raises:
        PlanError: A layer is not there, or cannot take its form or ranks.
    """
    reads = dict(structure.reads)
    factors = {one.layer: one for one in Factorization.of_axes(structure.ranks)}
    found = {}
    for name in dict.fromkeys([*reads, *factors]):
        layer = Layer.of(channels, name)
        blocks, sizes = layer.sizes(channels, row)
        before = layer.dense(blocks, sizes)
        if name in reads:
            sizes = Sizes(sizes.outputs, min(reads[name], sizes.inputs), sizes.kernel)
        after = layer.dense(blocks, sizes)
        if name in factors:
            form = form_of(factors[name], sizes)
            after = layer.factorized(blocks, sizes, form.stages(sizes, factors[name].ranks))
        found[name] = after - before
    return found


def macs_by_layer(channels: "ChannelGraph", structure: Structure) -> dict[str, int]:
    """MACs of every layer of a structure; a sequence counts under the name of the layer that it stands for."""
    row = channels.widths([structure])
    more = added(channels, structure, row)
    return {
        name: macs + (more[name].macs if name in more else 0)
        for name, macs in channels.costs.by_layer(channels.with_branches(structure, row)[0].tolist()).items()
    }
