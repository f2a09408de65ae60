"""What every importance criterion shares: finding a group's filters, aggregating, normalising, choosing.

A score says how much a channel matters: higher = keep. Scores of one unit come from every layer that
produces it (all filters of a residual stream, say). Each layer's scores are divided by their mean, so that
layers compare, and then aggregated: the mean asks how much a channel matters where it is made, the sum how much
its removal takes away in all those layers together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import DataError
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.labels.labeler import Slot

if TYPE_CHECKING:
    from compressor.passes.channels.analyze import ChannelGraph

Scores: TypeAlias = NDArray[np.float64]
Aggregate: TypeAlias = Literal["mean", "sum", "max"]

_AGGREGATES: dict[str, Callable[[Scores, NDArray[np.int64], int], Scores]] = {
    "sum": lambda values, units, size: _sum(values, units, size),
    "mean": lambda values, units, size: _sum(values, units, size) / np.maximum(np.bincount(units, minlength=size), 1),
    "max": lambda values, units, size: _maximum(values, units, size),
}


class Criterion(Protocol):
    """Scores the units of one group."""

    def __call__(self, scoring: "Scoring", group: ChannelGroup) -> Scores:
        """Importance per unit, (group.size,), finite; higher = keep."""


class Scoring:
    """What criteria read: the filters and norm scales of each group of a channel graph.

    Args:
        channels: The channel graph.
        gradients: Gradient of the loss per parameter name, for the criteria that need one.
    """

    def __init__(self, channels: "ChannelGraph", gradients: Mapping[str, Tensor] | None = None) -> None:
        self.channels = channels
        self.gradients = dict(gradients or {})
        self._tensors = {**dict(channels.graph.named_parameters()), **dict(channels.graph.named_buffers())}
        labeler = channels.walk.labeler
        self._filters = self._by_group([labeler.slots[key] for key in labeler.filters if key in labeler.slots])
        self._scales = self._by_group([labeler.slots[n, 0] for n in labeler.scales if (n, 0) in labeler.slots])

    def _by_group(self, slots: Sequence[Slot]) -> dict[int, list[Slot]]:
        result: dict[int, list[Slot]] = {}
        for slot in slots:
            for k in np.unique(self.channels.grouping.group_of[slot.labels]).tolist():
                result.setdefault(k, []).append(slot)
        return result

    def filters(self, group: ChannelGroup) -> list[Slot]:
        """Output axes of the weights that produce a group's channels."""
        return self._filters.get(self.channels.groups.index(group), [])

    def scales(self, group: ChannelGroup) -> list[Slot]:
        """Norm weights that scale a group's channels."""
        return self._scales.get(self.channels.groups.index(group), [])

    def rows(self, slot: Slot) -> Tensor:
        """(labels, elements): the slice of a parameter that belongs to each label of a slot.

        Raises:
            DataError: The parameter holds NaN or infinity.
        """
        tensor = self._tensors[slot.name].detach()
        if not torch.isfinite(tensor).all():
            raise DataError(f"`{slot.name}` holds NaN or infinity; these weights cannot be ranked")
        return _rows(tensor, slot)

    def gradient_rows(self, slot: Slot) -> Tensor:
        """The same rows of the gradient.

        Raises:
            DataError: No gradient was given for the parameter.
        """
        if slot.name not in self.gradients:
            raise DataError(f"no gradient for `{slot.name}`; collect gradients on training data first")
        return _rows(self.gradients[slot.name], slot)

    def units(self, group: ChannelGroup, slot: Slot) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which labels of a slot belong to the group, and to which of its units."""
        here = self.channels.grouping.group_of[slot.labels] == self.channels.groups.index(group)
        return here, self.channels.grouping.unit_of[slot.labels][here]


def _rows(tensor: Tensor, slot: Slot) -> Tensor:
    if slot.blocks == 1:
        return tensor.movedim(slot.axis, 0).reshape(tensor.shape[slot.axis], -1)
    per_block = tensor.reshape(slot.blocks, tensor.shape[0] // slot.blocks, *tensor.shape[1:])
    return per_block.movedim(1 + slot.axis, 1).reshape(len(slot.labels), -1)


def _sum(values: Scores, units: NDArray[np.int64], size: int) -> Scores:
    return np.asarray(np.bincount(units, values, size), dtype=np.float64)


def _maximum(values: Scores, units: NDArray[np.int64], size: int) -> Scores:
    result = np.full(size, -np.inf)
    np.maximum.at(result, units, values)
    return np.where(np.isneginf(result), 0.0, result)


@dataclass(frozen=True)
class FilterCriterion:
    """Base of criteria that score every filter by itself; a subclass says how in `of_filters`.

    Attributes:
        aggregate: How the scores of tied filters become one: their mean, sum or maximum.
        normalize: Divide each layer's scores by their mean first, so that scores compare across layers.
    """

    aggregate: Aggregate = field(default="mean")
    normalize: bool = field(default=True)

    def of_filters(self, scoring: Scoring, slot: Slot) -> Tensor:
        """Score per label of one slot."""
        raise NotImplementedError

    def slots(self, scoring: Scoring, group: ChannelGroup) -> list[Slot]:
        """Where the scores come from; the filters, unless a subclass says otherwise."""
        return scoring.filters(group)

    def __call__(self, scoring: Scoring, group: ChannelGroup) -> Scores:
        """See `Criterion`."""
        values, units = [], []
        for slot in self.slots(scoring, group):
            here, own = scoring.units(group, slot)
            scores = self.of_filters(scoring, slot).double().cpu().numpy()[here]
            mean = scores.mean()
            values.append(scores / mean if self.normalize and mean > 0 else scores)
            units.append(own)
        if not values:
            return np.ones(group.size)  # produced by computed weights only: nothing tells its units apart
        return _AGGREGATES[self.aggregate](np.concatenate(values), np.concatenate(units), group.size)


def select(group: ChannelGroup, scores: Scores, width: int) -> list[int]:
    """The indices that stay: the highest scores, the same share of every cell.

    Args:
        group: The group.
        scores: One per unit.
        width: How many stay; a multiple of `group.granularity`.
    """
    kept: list[int] = []
    for cell in group.cells:
        own = np.asarray(cell)
        order = np.argsort(-scores[own], kind="stable")  # equal scores: the lower index stays
        kept += own[order[: group.quota(cell, width)]].tolist()
    return sorted(kept)
