"""Channel labels: what the rules write down while they walk through a graph.

Every position of every labelled axis carries an integer label. `Labeler` only collects facts (labels
that are tied, frozen, produced, read; which parameter axis carries which labels; costs); what follows
from them is worked out once, in `channels.py`.

    conv1.weight axis 0   0  1  2  3       fresh labels: the channels that conv1 makes
    add                   0=4 1=5 2=6 3=7  two tensors meet: their labels are tied
    conv2.weight axis 1   8=0 9=1 …        conv2 reads them
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Value:
    """The labels of one tensor.

    An axis that is not in `axes` cannot change its size. Each label field of a tensor varies along one
    axis only; where an op would make it vary along two, the labels are tied until it does not.

    Attributes:
        shape: Concrete shape, with the traced batch size in place of the symbol.
        axes: Axis (non-negative) -> labels, as many as the axis is long.
        why: For messages: why the other axes carry no labels ("model input `x`").
        name: Qualified name, if it is a parameter or buffer as stored.
    """

    shape: tuple[int, ...]
    axes: Mapping[int, IntArray] = field(default_factory=dict)
    why: str = ""
    name: str = ""


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
    """

    layer: str
    constant: int
    factors: tuple[tuple[IntArray, int], ...]


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
        self.places: list[IntArray] = []
        self.regular: list[tuple[IntArray, str]] = []
        self.slots: dict[tuple[str, int], Slot] = {}
        self.terms: list[Term] = []
        self._parameters: dict[str, Value] = {}

    def fresh(self, count: int) -> IntArray:
        """`count` labels nobody has."""
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

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
        if weight and (weight, axis) not in self.filters:
            self.filters.append((weight, axis))

    def consume(self, labels: IntArray, layer: str) -> None:
        """`layer` reads these channels."""
        self.read.append((labels.reshape(-1), layer))

    def place(self, labels: IntArray) -> None:
        """An intermediate axis that must not become empty: its units form groups of their own."""
        self.places.append(labels)

    def lose(self, labels: IntArray, op: str) -> None:
        """`op` computes statistics over these channels: removing some changes what it does to the others."""
        self.lossy.append((labels.reshape(-1), op))

    def keep_regular(self, blocks: IntArray, op: str) -> None:
        """Every row of this 2-D array must keep equally many labels, because `op` works on equal blocks."""
        self.regular.append((blocks, op))

    def spend(self, layer: str, constant: int, *factors: tuple[IntArray, int]) -> None:
        """Record multiply-accumulates."""
        self.terms.append(Term(layer, constant, factors))

    def parameter(self, name: str, tensor: Tensor, axes: Sequence[int] | None = None) -> Value:
        """The labels of a stored tensor: fresh ones per axis at its first use, the same ones later.

        Args:
            name: Qualified name.
            tensor: The tensor itself.
            axes: Which axes to label; by default all that are longer than 1.
        """
        if name not in self._parameters:
            chosen = range(tensor.dim()) if axes is None else axes
            labels = {a: self.fresh(tensor.shape[a]) for a in chosen if tensor.shape[a] > 1}
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
