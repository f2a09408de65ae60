"""Batches of labelled images, as a user gives them."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.values.loaders import guarded

Batches: TypeAlias = Iterable[tuple[Tensor, Tensor]]
_ENDLESS = 100_000_000  # images of one pass over a loader that says no length


def labelled(batches: Batches, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, checked: `(inputs, labels (N,) of whole numbers)`.

    Args:
        batches: As the user gave them.
        what: What they are for, such as `validation`; it begins the messages.

    Raises:
        DataError: The loader fails, never ends, or yields something else; the batch is named.
    """
    first: object = None
    count = 0
    for k, batch in enumerate(guarded(batches, what)):
        if k and batch is first:
            raise DataError(f"{what}: batch {k} is batch 0 again: this loader never ends; pass one that ends, such as a list")
        first = batch if k == 0 else first
        pair = pair_of(batch, k)
        count += len(pair[0])
        if count > _ENDLESS:
            raise DataError(f"{what}: {count:,} images, and no end in sight; pass a loader that ends")
        yield pair


def pair_of(batch: object, index: int) -> tuple[Tensor, Tensor]:
    """A batch as `(inputs, labels)`, the labels as int64.

    Raises:
        DataError: It is something else, the labels are no whole numbers, or not one for each input.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise DataError(f"batch {index} must be a pair (inputs, labels) of tensors, found {_described(batch)}")
    x, y = batch
    if y.dim() != 1 or x.dim() == 0 or len(x) != len(y):
        advice = "; of one-hot labels pass y.argmax(1)" if y.dim() == 2 else ""
        raise DataError(f"batch {index}: labels must be (N,), one per input, found {tuple(y.shape)} for {tuple(x.shape)}{advice}")
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype is torch.bool:
        raise DataError(f"batch {index}: labels must be whole numbers, found {str(y.dtype).removeprefix('torch.')}")
    return x, y.long()


def _described(batch: object) -> str:
    if not isinstance(batch, list | tuple):
        return type(batch).__name__
    return f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch[:4]) or 'nothing'}"
