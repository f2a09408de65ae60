"""`spatial_svd`: k x 1 to r channels, then 1 x k (Jaderberg et al. 2014, scheme 2), by the SVD of (inputs * k, outputs * k).

With three spatial axes the first is separated from the other two.
"""

import math
from collections.abc import Sequence

import numpy as np

from compressor.passes.layers.forms.base import Array, Sizes, Stage, StageSizes, split


class SpatialSVD:
    """See the module."""

    name = "spatial_svd"

    def refuses(self, sizes: Sizes) -> str | None:
        """The kernel must extend along two axes."""
        if len(sizes.kernel) < 2 or sizes.kernel[0] == 1 or math.prod(sizes.kernel[1:]) == 1:
            return "its kernel does not extend along the first spatial axis and another one"
        return None

    def full(self, sizes: Sizes) -> tuple[int, ...]:
        """The smaller side of the matrix."""
        return (min(sizes.inputs * sizes.kernel[0], sizes.outputs * math.prod(sizes.kernel[1:])),)

    def stages(self, sizes: Sizes, ranks: Sequence[int]) -> list[StageSizes]:
        """Two."""
        others = tuple(range(1, len(sizes.kernel)))
        return [StageSizes(ranks[0], sizes.inputs, (0,)), StageSizes(sizes.outputs, ranks[0], others)]

    def unfoldings(self, weight: Array) -> list[Array]:
        """(inputs * k, outputs * k)."""
        outputs, inputs, height, *_ = weight.shape
        return [np.moveaxis(weight.reshape(outputs, inputs, height, -1), 0, 2).reshape(inputs * height, -1)]

    def factorize(self, weight: Array, ranks: Sequence[int]) -> list[Stage]:
        """The best approximation of this rank."""
        outputs, inputs, height, *rest = weight.shape
        first, last = self.stages(Sizes(outputs, inputs, (height, *rest)), ranks)
        (matrix,) = self.unfoldings(weight)
        left, right = split(matrix, ranks[0])  # (inputs * height, r), (r, outputs * rest)
        down = left.T.reshape(-1, inputs, height, *[1] * len(rest))
        up = np.moveaxis(right.reshape(-1, outputs, 1, *rest), 1, 0)
        return [Stage(first, down), Stage(last, up)]
