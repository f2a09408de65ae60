"""Channel labels: what the rules write down while they walk through a graph.

Every position of every labelled axis carries an integer label. `Labeler` only collects facts (labels
that are tied, frozen, produced, read; which parameter axis carries which labels; costs); what follows
from them is worked out once, in `groups.py`.

    conv1.weight axis 0   0  1  2  3       fresh labels: the channels that conv1 makes
    add                   0=4 1=5 2=6 3=7  two tensors meet: their labels are tied
    conv2.weight axis 1   8=0 9=1 …        conv2 reads them
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IntArray: TypeAlias = NDArray[np.int64]


@dataclass(eq=False)
class Split:
    """Channels that a view has spread over several axes.

    Attributes:
        labels: One axis per axis that they are spread over (its *root axes*).
        chosen: The root axis along which they may go; None as long as nothing has asked, -1 where none may.
        fixed: Root axes whose size the graph computes, so that it cannot be edited.
    """

    labels: IntArray
    chosen: int | None = None
    fixed: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Grid:
    """How a split lies in one tensor, as long as no axis has been chosen.

    Attributes:
        split: The split.
        positions: Flat positions in `split.labels`, over `axes`.
        axes: The axes of the tensor that it varies along.
        roots: The root axis that runs along each of them.
    """

    split: Split
    positions: IntArray
    axes: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """The labels of one tensor.

    An axis that is in neither `axes` nor `grids` cannot change its size.

    Attributes:
        shape: Concrete shape, with the traced batch size in place of the symbol.
        axes: Axis (non-negative) -> labels, as many as the axis is long.
        grids: Channels spread over several axes, before one of them is chosen; rules that are not made
            for them see values without (`splits.settle`).
        why: For messages: why the other axes carry no labels ("model input `x`").
        name: Qualified name, if it is a parameter or buffer as stored.
    """

    shape: tuple[int, ...]
    axes: Mapping[int, IntArray] = field(default_factory=dict)
    why: str = ""
    name: str = ""
    grids: tuple[Grid, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One axis of one parameter or buffer, and the labels along it.

    Attributes:
        name: Qualified name of the tensor.
        axis: The axis.
        labels: 1-D, as long as the axis times `blocks`.
        blocks: 1, or the groups of a grouped convolution whose weight holds only the own block's
            inputs: position `j` of an output row in block `b` belongs to `labels[b * size + j]`.
    """

    name: str
    axis: int
    labels: IntArray
    blocks: int = 1


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of one op for one sample: `constant` times the product of live counts.

    Attributes:
        layer: The layer that spends them.
        constant: What does not depend on widths (positions, kernel size).
        factors: `(labels, divisor)`; the live count of the labels, divided.
        node: The node of the op.
    """

    layer: str
    constant: int
    factors: tuple[tuple[IntArray, int], ...]
    node: str = ""


class Labeler:
    """Facts about channels, collected by the rules."""

    def __init__(self) -> None:
        self.count = 0
        self.ties: list[tuple[IntArray, IntArray]] = []
        self.frozen: list[tuple[IntArray, str]] = []
        self.produced: list[tuple[IntArray, str]] = []
        self.filters: list[tuple[str, int]] = []
        self.scales: list[str] = []
        self.read: list[tuple[IntArray, str]] = []
        self.lossy: list[tuple[IntArray, str]] = []
        self.statistics: set[str] = set()
        self.places: list[IntArray] = []
        self.blocks: list[tuple[IntArray, str, str]] = []
        self.needs: list[tuple[IntArray, int, str]] = []
        self.regular: list[tuple[IntArray, str]] = []
        self.slots: dict[tuple[str, int], Slot] = {}
        self.terms: list[Term] = []
        self.node = ""
        self._parameters: dict[str, Value] = {}
        self._blank: list[int] = []  # first and past-the-last label of every run of blanks, ascending

    def fresh(self, count: int) -> IntArray:
        """`count` labels nobody has."""
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def blanks(self, count: int) -> IntArray:
        """Labels that nothing has made yet (fillings, repetitions, stored tensors): they follow whatever they meet."""
        labels = self.fresh(count)
        self._blank += [self.count - count, self.count]
        return labels

    def is_blank(self, labels: IntArray) -> bool:
        """Whether these came from `blanks`, and no layer produces them."""
        return bisect.bisect_right(self._blank, int(labels.reshape(-1)[0])) % 2 == 1

    def tie(self, left: IntArray, right: IntArray) -> None:
        """`left[k]` and `right[k]` live and die together."""
        if left.shape != right.shape:
            raise ValueError(f"cannot tie {left.shape} labels to {right.shape}")
        self.ties.append((left.reshape(-1), right.reshape(-1)))

    def freeze(self, labels: IntArray, reason: str) -> None:
        """These must stay, for this reason."""
        self.frozen.append((labels.reshape(-1), reason))

    def freeze_value(self, value: Value, reason: str) -> None:
        """Freeze every label of a tensor."""
        for labels in value.axes.values():
            self.freeze(labels, reason)

    def produce(self, labels: IntArray, layer: str, weight: str, axis: int) -> None:
        """`layer` computes these channels; only produced channels form groups.

        Args:
            labels: The channels.
            layer: Qualified name of the layer.
            weight: Name of the stored weight whose slices along `axis` are their filters; empty if computed.
            axis: The output axis of the weight.
        """
        self.produced.append((labels.reshape(-1), layer))
        at = bisect.bisect_right(self._blank, int(labels.reshape(-1)[0]))
        if at % 2:
            del self._blank[at - 1 : at + 1]
        if weight and (weight, axis) not in self.filters:
            self.filters.append((weight, axis))

    def consume(self, labels: IntArray, layer: str) -> None:
        """`layer` reads these channels."""
        self.read.append((labels.reshape(-1), layer))

    def place(self, labels: IntArray) -> None:
        """An intermediate axis that must not become empty: its units form groups of their own."""
        self.places.append(labels)

    def lose(self, labels: IntArray, op: str, node: str) -> None:
        """`op`, the node `node`, computes statistics over these channels: removing some changes what it does to the others."""
        self.lossy.append((labels.reshape(-1), op))
        self.statistics.add(node)

    def need(self, labels: IntArray, count: int, op: str) -> None:
        """`op` is not defined over fewer than `count` of these channels (an unbiased variance over one)."""
        self.needs.append((labels.reshape(-1), count, op))

    def block(self, blocks: IntArray, op: str, node: str) -> None:
        """`op`, the node `node`, computes statistics over each row: rows go as a whole, which is exact.

        Unless that would leave an equal-count constraint with a single unit per block, so that nothing could
        go: then every row keeps equally many, and the op is lossy. Decided when all ties are known.
        """
        self.blocks.append((blocks, op, node))

    def keep_regular(self, blocks: IntArray, op: str) -> None:
        """Every row of this 2-D array must keep equally many labels, because `op` works on equal blocks."""
        self.regular.append((blocks, op))

    def spend(self, layer: str, constant: int, *factors: tuple[IntArray, int]) -> None:
        """Record multiply-accumulates."""
        self.terms.append(Term(layer, constant, factors, self.node))

    def parameter(self, name: str, tensor: Tensor, axes: Sequence[int] | None = None) -> Value:
        """The labels of a stored tensor: fresh ones per axis at its first use, the same ones later.

        Args:
            name: Qualified name.
            tensor: The tensor itself.
            axes: Which axes to label; by default all that are longer than 1.
        """
        if name not in self._parameters:
            chosen = range(tensor.dim()) if axes is None else axes
            labels = {a: self.blanks(tensor.shape[a]) for a in chosen if tensor.shape[a] > 1}
            for axis, own in labels.items():
                self.slots[name, axis] = Slot(name, axis, own)
            self._parameters[name] = Value(tuple(tensor.shape), labels, f"`{name}`", name)
        return self._parameters[name]

    def block_slot(self, slot: Slot) -> None:
        """Say which labels the blocked axis of a grouped weight carries; a second use of the weight ties them."""
        known = self.slots.get((slot.name, slot.axis))
        if known is not None and known.blocks == slot.blocks:
            self.tie(known.labels, slot.labels)
        else:
            self.slots[slot.name, slot.axis] = slot

    def scale(self, name: str) -> None:
        """The tensor `name` scales normalised channels (the weight of a batch norm)."""
        if name and name not in self.scales:
            self.scales.append(name)
