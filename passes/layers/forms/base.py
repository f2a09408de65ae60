"""What a factorized form is: a convolution as a sequence of smaller ones, on plain arrays.

A layer's weight is taken block by block (a grouped convolution has several), as W (outputs, inputs, *kernel). A form writes it
as stages, each a convolution over some of the spatial axes:

    svd           k x k to r channels, then 1 x 1                           W = U S V'
    spatial_svd   k x 1 to r channels, then 1 x k
    tucker2       1 x 1 to r0, k x k to r1, 1 x 1
    cp            1 x 1 to r, k x 1 and 1 x k depthwise, 1 x 1
    tensor_train  1 x 1 to r0, k x 1 to r1, 1 x k to r2, 1 x 1

Decompositions are tensorly's, on float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """Of one block of a layer.

    Attributes:
        outputs: Channels made.
        inputs: Channels read.
        kernel: Along every spatial axis; empty for a linear layer.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Of the weight."""
        return self.outputs * self.inputs * math.prod(self.kernel)


@dataclass(frozen=True)
class StageSizes:
    """One stage of a form, without its weight.

    Attributes:
        outputs: Channels made.
        inputs: Channels read.
        axes: Spatial axes that it runs over, with the layer's kernel, stride, padding and dilation there; 1 elsewhere.
        depthwise: Whether each channel is made from itself alone.
    """

    outputs: int
    inputs: int
    axes: tuple[int, ...] = ()
    depthwise: bool = False

    def elements(self, kernel: Sequence[int]) -> int:
        """Of its weight."""
        return self.outputs * (1 if self.depthwise else self.inputs) * math.prod(kernel[axis] for axis in self.axes)


@dataclass(frozen=True)
class Stage:
    """One stage with its weight, (outputs, inputs, *kernel); the kernel is 1 along axes that it does not run over."""

    sizes: StageSizes
    weight: Array


class Form(Protocol):
    """A factorized form."""

    @property
    def name(self) -> str:
        """In plans and on the command line."""

    def refuses(self, sizes: Sizes) -> str | None:
        """Why it cannot factorize such a block; None where it can."""

    def full(self, sizes: Sizes) -> tuple[int, ...]:
        """The ranks at which the form is exact; no rank may be larger."""

    def stages(self, sizes: Sizes, ranks: Sequence[int]) -> list[StageSizes]:
        """Its stages."""

    def unfoldings(self, weight: Array) -> list[Array]:
        """For every rank the matrix whose rank it bounds; none where a rank is not that of a matrix."""

    def factorize(self, weight: Array, ranks: Sequence[int]) -> list[Stage]:
        """The best stages found for a weight (outputs, inputs, *kernel)."""


def needs_a_kernel(sizes: Sizes) -> str | None:
    """Why a form that separates channels from pixels refuses a block; None where it does not."""
    if math.prod(sizes.kernel) == 1:
        return "its kernel is a single pixel: use svd"
    return "it has one input or one output" if min(sizes.inputs, sizes.outputs) < 2 else None


def compose(stages: Sequence[Stage]) -> Array:
    """The weight (outputs, inputs, *kernel) that a sequence of stages amounts to."""
    total = stages[0].weight
    for stage in stages[1:]:
        kernel = total.shape[2:]
        if stage.sizes.depthwise:
            total = total * stage.weight  # their kernels run over different axes
            continue
        own = stage.weight.shape[2:]
        product = np.tensordot(_flat(stage.weight), total.reshape(len(total), -1), axes=(1, 0))  # (out, own kernel, in, kernel)
        outputs, inputs, rank = stage.weight.shape[0], total.shape[1], len(kernel)
        wide = product.reshape(outputs, *own, inputs, *kernel)
        order = [0, rank + 1, *[axis for k in range(rank) for axis in (1 + k, rank + 2 + k)]]
        total = wide.transpose(order).reshape(outputs, inputs, *[a * b for a, b in zip(own, kernel, strict=True)])
    return total


def _flat(weight: Array) -> Array:
    """(outputs, inputs, *kernel) as (outputs * kernel, inputs)."""
    moved = np.moveaxis(weight, 1, -1)
    return moved.reshape(-1, weight.shape[1])


def split(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Truncated SVD with the singular values shared out: `left` (rows, rank) times `right` (rank, columns)."""
    from tensorly.tenalg import svd_interface

    left, values, right = svd_interface(matrix, method="truncated_svd", n_eigenvecs=min(matrix.shape))
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]
