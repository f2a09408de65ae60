"""`cp`: 1 x 1 to r channels, k x 1 and 1 x k depthwise, 1 x 1 (Lebedev et al. 2015), by tensorly's alternating least squares.

Unlike the other forms it has no closed form: what is found is a local minimum.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np

from compressor.passes.forms.base import Array, Sizes, Stage, StageSizes, needs_a_kernel

_ITERATIONS = 200


class CP:
    """See the module."""

    name = "cp"

    def refuses(self, sizes: Sizes) -> str | None:
        """See `needs_a_kernel`."""
        return needs_a_kernel(sizes)

    def full(self, sizes: Sizes) -> tuple[int, ...]:
        """The product of all sides but the longest: that many rank-one terms write any tensor."""
        sides = (sizes.outputs, sizes.inputs, *sizes.kernel)
        return (math.prod(sides) // max(sides),)

    def stages(self, sizes: Sizes, ranks: Sequence[int]) -> list[StageSizes]:
        """A depthwise one per spatial axis between two of 1 x 1."""
        own = [StageSizes(ranks[0], ranks[0], (axis,), depthwise=True) for axis in range(len(sizes.kernel))]
        return [StageSizes(ranks[0], sizes.inputs), *own, StageSizes(sizes.outputs, ranks[0])]

    def unfoldings(self, weight: Array) -> list[Array]:
        """None: how many terms a tensor needs is not the rank of a matrix."""
        del weight
        return []

    def factorize(self, weight: Array, ranks: Sequence[int]) -> list[Stage]:
        """Alternating least squares; the terms of a full rank are written down."""
        outputs, inputs, *kernel = weight.shape
        sizes = Sizes(outputs, inputs, tuple(kernel))
        factors = _exact(weight) if ranks[0] >= self.full(sizes)[0] else _fitted(weight, ranks[0])
        one = [1] * len(kernel)
        weights = [factors[1].T.reshape(-1, inputs, *one)]
        for axis, factor in enumerate(factors[2:]):
            weights.append(factor.T.reshape(-1, 1, *[k if own == axis else 1 for own, k in enumerate(kernel)]))
        weights.append(factors[0].reshape(outputs, -1, *one))
        return [Stage(own, array) for own, array in zip(self.stages(sizes, ranks), weights, strict=True)]


def _fitted(weight: Array, rank: int) -> list[Array]:
    """Factors (side, rank), equally long in every term, so that no stage over- or underflows."""
    from tensorly.decomposition import parafac

    unit = float(np.linalg.norm(weight)) or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more terms than a side is long: the start is filled up at random
        _, factors = parafac(weight / unit, rank, n_iter_max=_ITERATIONS, init="svd", tol=1e-7, random_state=0)
    lengths = np.stack([np.linalg.norm(factor, axis=0) for factor in factors]).clip(1e-30)
    each = (unit * lengths.prod(axis=0)) ** (1 / len(factors))
    return [np.asarray(factor / length * each) for factor, length in zip(factors, lengths, strict=True)]


def _exact(weight: Array) -> list[Array]:
    """One term per fibre along the longest side."""
    longest = int(np.argmax(weight.shape))
    rest = [side for k, side in enumerate(weight.shape) if k != longest]
    fibres = np.moveaxis(weight, longest, 0).reshape(weight.shape[longest], -1)
    places = np.unravel_index(np.arange(fibres.shape[1]), rest)
    units = [np.eye(side)[:, place] for side, place in zip(rest, places, strict=True)]
    return [*units[:longest], fibres, *units[longest:]]
