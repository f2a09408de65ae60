"""Batches of labelled images, as a user gives them."""

from collections.abc import Iterable, Sized
from typing import TypeAlias

from torch import Tensor

from compressor.errors import DataError

Batches: TypeAlias = Iterable[tuple[Tensor, Tensor]]


def batch_count(batches: Batches) -> int | None:
    """How many batches there are, where that can be told."""
    return len(batches) if isinstance(batches, Sized) else None


def pair_of(batch: object, index: int) -> tuple[Tensor, Tensor]:
    """A batch as `(inputs, labels)`.

    Raises:
        DataError: It is something else.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise DataError(f"batch {index} must be a pair (inputs, labels) of tensors, found {type(batch).__name__}")
