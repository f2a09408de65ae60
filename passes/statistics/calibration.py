"""Calibration data: some inputs, read once, checked, and kept for every pass that asks.

Labels are not needed; where batches are pairs, the first of each is the input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.tracing.trace import DYNAMIC, INPUTS
from compressor.values.loaders import guarded

_LEAST = 8
"""Images below which a mean is no statistic."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs of a network.

    Attributes:
        batches: The inputs of each forward pass; one tensor (N, …) per input of the network.
        fixed: Whether the network takes batches of one size only, which are then used or left as a whole.
    """

    batches: tuple[tuple[Tensor, ...], ...]
    fixed: bool = False

    @property
    def images(self) -> int:
        """How many samples there are."""
        return sum(len(batch[0]) for batch in self.batches)

    def first(self, images: int) -> "Calibration":
        """At most this many samples, from the beginning."""
        chosen: list[tuple[Tensor, ...]] = []
        for batch in self.batches:
            left = images - sum(len(own[0]) for own in chosen)
            if left > 0:
                chosen.append(batch if self.fixed else tuple(x[:left] for x in batch))
        return Calibration(tuple(chosen), self.fixed)

    def after(self, images: int) -> "Calibration":
        """All but the first so many."""
        chosen: list[tuple[Tensor, ...]] = []
        for batch in self.batches:
            skipped = min(images, len(batch[0]))
            images -= skipped
            if skipped < len(batch[0]) and not (self.fixed and skipped):
                chosen.append(tuple(x[skipped:] for x in batch))
        return Calibration(tuple(chosen), self.fixed)

    @classmethod
    def read(cls, batches: Iterable[object], graph: fx.GraphModule, images: int, least: int = _LEAST) -> "Calibration":
        """Read and check.

        Args:
            batches: Tensors, or tuples that begin with the network's inputs, such as `(inputs, labels)`.
            graph: The traced network they are for.
            images: Read until there are this many; the rest is left.
            least: How many are enough.

        Raises:
            DataError: A batch has another shape or type than the network takes, holds NaN or infinity, shows the
                same everywhere, the loader fails or ends early, or there are fewer than 8 images. The batch is named.
        """
        expected = graph.meta[INPUTS]
        found: list[tuple[Tensor, ...]] = []
        dynamic = bool(graph.meta[DYNAMIC])
        count = 0
        for k, batch in enumerate(guarded(batches, "calibration")):
            tensors = _inputs_of(batch, k, len(expected))
            for x, (shape, dtype) in zip(tensors, expected, strict=True):
                _check(x, k, shape, dtype, dynamic)
            _check_variety(tensors[0], k)
            found.append(tuple(x[: images - count] for x in tensors) if dynamic else tensors)
            count += len(found[-1][0])
            if count >= images:
                break
        if count < least:
            last = f"batch {len(found) - 1} is the last" if found else "there is no batch"
            raise DataError(f"calibration: {count} images in all ({last}); at least {least} are needed, some hundreds are better")
        return cls(tuple(found), not dynamic)


def _inputs_of(batch: object, k: int, count: int) -> tuple[Tensor, ...]:
    parts: Sequence[object] = batch if isinstance(batch, list | tuple) else (batch,)
    tensors = tuple(part for part in parts[:count] if isinstance(part, Tensor))
    if len(tensors) < count:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise DataError(f"calibration: batch {k}: the network takes {count} tensors, found {kinds or 'nothing'}")
    return tensors


def _check(x: Tensor, k: int, shape: tuple[int, ...], dtype: str, dynamic: bool) -> None:
    found = tuple(x.shape)
    if len(found) != len(shape) or found[1:] != shape[1:] or not found[0] or (not dynamic and found != shape):
        wanted = f"(N, {', '.join(map(str, shape[1:]))})" if dynamic else str(shape)
        raise DataError(f"calibration: batch {k} has shape {found}, the network takes {wanted}")
    if str(x.dtype).removeprefix("torch.") != dtype:
        raise DataError(f"calibration: batch {k} is {str(x.dtype).removeprefix('torch.')}, the network takes {dtype}")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError(f"calibration: batch {k} holds NaN or infinity")


def _check_variety(x: Tensor, k: int) -> None:
    """Statistics of constants are none; only the first input is looked at, a mask or a time step may well be constant."""
    flat = x.reshape(len(x), -1)
    if len(x) > 1 and flat.shape[1] > 1 and bool((flat.amax(1) == flat.amin(1)).all()):
        raise DataError(f"calibration: batch {k}: every image is constant; statistics of such images say nothing")
    if len(x) > 1 and bool((flat == flat[0]).all()):
        raise DataError(f"calibration: batch {k}: all {len(x)} images are the same")
