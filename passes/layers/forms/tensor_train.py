"""`tensor_train`: 1 x 1 to r0 channels, one convolution per spatial axis, 1 x 1 (Oseledets 2011), by tensorly's TT-SVD.

The train runs inputs, first spatial axis, …, last spatial axis, outputs. TT-SVD cuts one rank after the other, which is within the
square root of their number of the best (Oseledets, corollary 2.4): with larger ranks throughout it comes nearer, with one of them
raised alone it may not.
"""

import math
from collections.abc import Sequence

import numpy as np

from compressor.passes.layers.forms.base import Array, Sizes, Stage, StageSizes, needs_a_kernel


class TensorTrain:
    """See the module."""

    name = "tensor_train"

    def refuses(self, sizes: Sizes) -> str | None:
        """See `needs_a_kernel`."""
        return needs_a_kernel(sizes)

    def full(self, sizes: Sizes) -> tuple[int, ...]:
        """Of every cut of the train, the smaller side."""
        sides = (sizes.inputs, *sizes.kernel, sizes.outputs)
        return tuple(min(math.prod(sides[:cut]), math.prod(sides[cut:])) for cut in range(1, len(sides)))

    def stages(self, sizes: Sizes, ranks: Sequence[int]) -> list[StageSizes]:
        """One per side."""
        middle = [StageSizes(ranks[axis + 1], ranks[axis], (axis,)) for axis in range(len(sizes.kernel))]
        return [StageSizes(ranks[0], sizes.inputs), *middle, StageSizes(sizes.outputs, ranks[-1])]

    def unfoldings(self, weight: Array) -> list[Array]:
        """The train cut behind every side."""
        train = np.moveaxis(weight, 0, -1)
        return [train.reshape(math.prod(train.shape[:cut]), -1) for cut in range(1, train.ndim)]

    def factorize(self, weight: Array, ranks: Sequence[int]) -> list[Stage]:
        """TT-SVD; ranks that the cuts before them do not allow are filled with zeros."""
        from tensorly.decomposition import tensor_train

        outputs, inputs, *kernel = weight.shape
        train = np.moveaxis(weight, 0, -1)  # (inputs, *kernel, outputs)
        possible = [1]
        for rank, side in zip(ranks, train.shape[:-1], strict=True):
            possible.append(min(rank, possible[-1] * side))
        cores = tensor_train(train, rank=[*possible, 1]).factors
        sizes = self.stages(Sizes(outputs, inputs, tuple(kernel)), ranks)
        found = []
        for k, (core, own) in enumerate(zip(cores, sizes, strict=True)):
            before, side, after = core.shape
            if k in (0, len(cores) - 1):
                matrix = core[0].T if k == 0 else core[:, :, 0].T  # (r0, inputs), (outputs, r)
                array = matrix.reshape(*matrix.shape, *[1] * len(kernel))
            else:
                wide = [side if axis == k - 1 else 1 for axis in range(len(kernel))]
                array = core.transpose(2, 0, 1).reshape(after, before, *wide)
            more = [(0, own.outputs - array.shape[0]), (0, own.inputs - array.shape[1])]
            found.append(Stage(own, np.pad(array, more + [(0, 0)] * len(kernel))))
        return found
