"""`tucker2`: 1 x 1 to r0 channels, k x k to r1, 1 x 1 (Kim et al. 2016): Tucker along inputs and outputs, by tensorly's HOOI."""

import math
from collections.abc import Sequence

import numpy as np

from compressor.passes.layers.forms.base import Array, Sizes, Stage, StageSizes, needs_a_kernel

_ITERATIONS = 20


class Tucker2:
    """See the module."""

    name = "tucker2"

    def refuses(self, sizes: Sizes) -> str | None:
        """See `needs_a_kernel`."""
        return needs_a_kernel(sizes)

    def full(self, sizes: Sizes) -> tuple[int, ...]:
        """Inputs and outputs, or what the other side of their unfolding allows."""
        pixels = math.prod(sizes.kernel)
        return min(sizes.inputs, sizes.outputs * pixels), min(sizes.outputs, sizes.inputs * pixels)

    def stages(self, sizes: Sizes, ranks: Sequence[int]) -> list[StageSizes]:
        """Three."""
        axes = tuple(range(len(sizes.kernel)))
        return [StageSizes(ranks[0], sizes.inputs), StageSizes(ranks[1], ranks[0], axes), StageSizes(sizes.outputs, ranks[1])]

    def unfoldings(self, weight: Array) -> list[Array]:
        """Along inputs and along outputs."""
        return [np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1) for axis in (1, 0)]

    def factorize(self, weight: Array, ranks: Sequence[int]) -> list[Stage]:
        """Higher-order orthogonal iteration from the truncated HOSVD."""
        from tensorly.decomposition import partial_tucker

        outputs, inputs, *kernel = weight.shape
        sizes = Sizes(outputs, inputs, tuple(kernel))
        # An unfolding of rank r1 cannot have more than r1 * pixels independent inputs, and the other way round.
        pixels = math.prod(kernel)
        wanted = min(ranks[1], ranks[0] * pixels), min(ranks[0], ranks[1] * pixels)
        (core, (out, into)), _ = partial_tucker(weight, rank=list(wanted), modes=[0, 1], init="svd", n_iter_max=_ITERATIONS)
        one = [1] * len(kernel)
        first, middle, last = self.stages(sizes, (wanted[1], wanted[0]))
        found = [Stage(first, into.T.reshape(-1, inputs, *one)), Stage(middle, core), Stage(last, out.reshape(outputs, -1, *one))]
        return [_widened(stage, own) for stage, own in zip(found, self.stages(sizes, ranks), strict=True)]


def _widened(stage: Stage, sizes: StageSizes) -> Stage:
    """Zeros up to the size that was asked for."""
    more = [(0, sizes.outputs - stage.sizes.outputs), (0, sizes.inputs - stage.sizes.inputs)]
    return Stage(sizes, np.pad(stage.weight, more + [(0, 0)] * (stage.weight.ndim - 2)))
