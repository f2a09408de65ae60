"""`Samples`: batches as a user's loader gives them, together with the task that says what they mean."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import DataError
from compressor.tasks.classification import classification
from compressor.tasks.task import Task
from compressor.values.loaders import batch_count, guarded

Batches: TypeAlias = Iterable[Any]
"""Whatever a loader yields; pairs `(inputs, labels)` for a classifier."""


class Around(Protocol):
    """The model that a network is a part of."""

    def __call__(self, graph: nn.Module) -> nn.Module:
        """The model with a network in its place, until the next call."""

    def inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The network's inputs for inputs of the model."""


_ENDLESS = 100_000_000  # images of one pass over a loader that says no length


@dataclass(frozen=True, eq=False)
class Sample:
    """A batch.

    Attributes:
        task: What it means.
        batch: As the loader gave it, checked by the task.
        inputs: Of the network, (N, …) each.
        number: Of the batch in its loader.
        around: What the network is a part of; None for nothing.
    """

    task: Task
    batch: Any
    inputs: tuple[Tensor, ...]
    number: int = 0
    around: Around | None = None

    @property
    def count(self) -> int:
        """Samples in it."""
        return len(self.inputs[0])

    def to(self, device: torch.device) -> "Sample":
        """The same on a device."""
        if all(x.device == device for x in self.tensors()):
            return self
        return replace(self, batch=_moved(self.batch, device), inputs=tuple(x.to(device) for x in self.inputs))

    def first(self, count: int) -> "Sample":
        """Its first samples; all of them where it is not only tensors with one row per sample."""
        leaves = pytree.tree_leaves(self.batch)
        batch = self.batch
        parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
        listed = any(isinstance(own, list) and len(own) == self.count for own in parts)  # one entry per sample
        if (
            count >= self.count
            or listed
            or not self.task.rows
            or not all(isinstance(x, Tensor) and x.dim() and len(x) == self.count for x in leaves)
        ):
            return self
        batch = pytree.tree_map(lambda x: x[:count], self.batch)
        return replace(self, batch=batch, inputs=tuple(x[:count] for x in self.inputs))

    def laid_out(self, layout: torch.memory_format) -> "Sample":
        """Its images in a memory format."""
        return replace(self, inputs=tuple(in_layout(x, layout) for x in self.inputs))

    def outputs(self, model: nn.Module) -> Any:
        """What a network on the sample's device gives; of a part of a model, what the whole model gives with it."""
        return (self.around(model) if self.around is not None else model)(*self.inputs)

    def loss(self, outputs: Any) -> Tensor:
        """See `Task.loss`.

        Raises:
            DataError: It is not finite, or no number; the batch is named.
        """
        try:
            return self.task.loss_of(outputs, self.batch)
        except DataError as error:
            raise type(error)(f"batch {self.number}: {error}") from error

    def tensors(self) -> list[Tensor]:
        """All that are in the batch."""
        return [x for x in (*pytree.tree_leaves(self.batch), *self.inputs) if isinstance(x, Tensor)]


@dataclass(frozen=True, eq=False)
class Samples:
    """Batches and what they mean; iterating gives the batches as they are.

    Attributes:
        batches: The loader.
        task: What its batches mean.
        names: Of the network's inputs, to put a dict of them in order.
        around: What the network is a part of; None for nothing.
    """

    batches: Batches
    task: Task
    names: tuple[str, ...] = ()
    around: Around | None = None

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        return iter(self.batches)

    def __len__(self) -> int:
        """How many there are."""
        count = batch_count(self.batches)
        if count is None:
            raise TypeError("this loader does not say how many batches it has")
        return count

    def read(self, what: str) -> Iterator[Sample]:
        """The batches, checked.

        Args:
            what: What they are for, such as `validation`; it begins the messages.

        Raises:
            DataError: The loader fails, never ends, or yields what the task cannot read; the batch is named.
        """
        first: object = None
        count = 0
        for k, batch in enumerate(guarded(self.batches, what)):
            if k and batch is first:
                raise DataError(f"{what}: batch {k} is batch 0 again: this loader never ends; pass one that ends, such as a list")
            first = batch if k == 0 else first
            sample = self.sample(batch, k)
            count += sample.count
            if count > _ENDLESS:
                raise DataError(f"{what}: {count:,} images, and no end in sight; pass a loader that ends")
            yield sample

    def sample(self, batch: Any, k: int = 0) -> Sample:
        """One batch.

        Raises:
            DataError: It is not what the task reads.
        """
        batch = self.task.checked(batch, k)
        return Sample(self.task, batch, self.task.inputs_of(batch, self.names, k), k, self.around)


def samples_of(batches: Batches) -> Samples:
    """Batches with their meaning: pairs `(inputs, labels)` of a classifier where nothing else is said."""
    return batches if isinstance(batches, Samples) else Samples(batches, classification())


def read(batches: Batches | Sequence[Sample], what: str) -> Iterator[Sample]:
    """Batches of a loader, or such as have been read already."""
    if isinstance(batches, list | tuple) and batches and isinstance(batches[0], Sample):
        yield from batches
    else:
        yield from samples_of(batches).read(what)


def first_samples(batches: Batches | Sequence[Sample], images: int, whole: bool) -> list[Sample]:
    """The first so many images of a hold-out; a few more where batches are left whole.

    Raises:
        DataError: There are none.
    """
    found: list[Sample] = []
    for sample in read(batches, "hold-out"):
        left = images - sum(own.count for own in found)
        if left <= 0:
            break
        found.append(sample if whole else sample.first(left))
    if not found:
        raise DataError("there is no hold-out to judge candidates on: validate=… yields no batch")
    return found


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Images in a memory format; anything else as it is."""
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


def tensors_of(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """All tensors of some batches by number, for a digest."""
    return {f"{k}.{n}": x for k, sample in enumerate(samples) for n, x in enumerate(sample.tensors())}


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, however nested; what has its own `to` (a batch of some library) is asked."""
    if isinstance(value, Tensor) or (hasattr(value, "to") and not isinstance(value, type)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(own, device) for name, own in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(own, device) for own in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(own, device) for own in value)
    return value
