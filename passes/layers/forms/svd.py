"""`svd`: k x k to r channels, then 1 x 1. The truncated SVD of the matrix (outputs, inputs * kernel), as in CC."""

import math
from collections.abc import Sequence

from compressor.passes.layers.forms.base import Array, Sizes, Stage, StageSizes, split


class SVD:
    """See the module."""

    name = "svd"

    def refuses(self, sizes: Sizes) -> str | None:
        """One output or one column has no smaller rank."""
        return "its matrix has one row or one column" if self.full(sizes)[0] < 2 else None

    def full(self, sizes: Sizes) -> tuple[int, ...]:
        """The smaller side of the matrix."""
        return (min(sizes.outputs, sizes.inputs * math.prod(sizes.kernel)),)

    def stages(self, sizes: Sizes, ranks: Sequence[int]) -> list[StageSizes]:
        """Two."""
        axes = tuple(range(len(sizes.kernel)))
        return [StageSizes(ranks[0], sizes.inputs, axes), StageSizes(sizes.outputs, ranks[0])]

    def unfoldings(self, weight: Array) -> list[Array]:
        """(outputs, inputs * kernel)."""
        return [weight.reshape(len(weight), -1)]

    def factorize(self, weight: Array, ranks: Sequence[int]) -> list[Stage]:
        """The best approximation of this rank (Eckart and Young, 1936)."""
        outputs, inputs, *kernel = weight.shape
        first, last = self.stages(Sizes(outputs, inputs, tuple(kernel)), ranks)
        left, right = split(weight.reshape(outputs, -1), ranks[0])
        return [Stage(first, right.reshape(-1, inputs, *kernel)), Stage(last, left.reshape(outputs, -1, *[1] * len(kernel)))]
