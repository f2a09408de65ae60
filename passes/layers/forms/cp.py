"""`cp`: 1 x 1 to r channels, k x 1 and 1 x k depthwise, 1 x 1 (Lebedev et al. 2015), by tensorly's alternating least squares.

Unlike the other forms it has no closed form: what is found is a local minimum. From the singular vectors of the unfoldings alone
one rank may end up worse than the one below it, by up to 11 % on small random layers, so terms are added a few at a time, the best
ones for what is left, each time with some iterations over all of them: 64 x 64 x 3 x 3 random weights at rank 100 are then
1.8 % nearer, for 1.8 times the time.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from compressor.passes.layers.forms.base import Array, Sizes, Stage, StageSizes, needs_a_kernel

_ADDED = 16  # one in so many: terms that are added to those that are there, at least one
_NOTHING = 1e-14  # of a weight's norm: a remainder that no terms are added for
_RIDGE = 1e-12  # beside the square of a weight's norm, where normal equations are singular
_ITERATIONS = {"new": 20, "all": 20, "last": 60}  # over the terms that are added, over all of them, and at the end


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
    from tensorly.cp_tensor import cp_to_tensor

    unit = float(np.linalg.norm(weight)) or 1.0
    goal, factors = weight / unit, [np.zeros((side, 0)) for side in weight.shape]
    for count in _counts(rank):
        have = factors[0].shape[1]
        left = goal - cp_to_tensor((np.ones(have), factors)) if have else goal
        if float(np.linalg.norm(left)) <= _NOTHING:
            break
        new = _alternated(left, count - have, "svd", _ITERATIONS["new"])
        start = (np.ones(count), [np.concatenate(pair, axis=1) for pair in zip(factors, new, strict=True)])
        factors = _alternated(goal, count, start, _ITERATIONS["last" if count == rank else "all"])
    factors = [np.pad(factor, ((0, 0), (0, rank - factor.shape[1]))) for factor in factors]  # terms that nothing is left for
    lengths = np.stack([np.linalg.norm(factor, axis=0) for factor in factors]).clip(1e-30)
    each = (unit * lengths.prod(axis=0)) ** (1 / len(factors))
    return [np.asarray(factor / length * each) for factor, length in zip(factors, lengths, strict=True)]


def _counts(rank: int) -> Iterator[int]:
    """How many terms there are after each step; the same for all ranks but for the last one."""
    count = 0
    while count < rank:
        count = min(count + max(1, count // _ADDED), rank)
        yield count


def _alternated(tensor: Array, rank: int, init: object, iterations: int) -> list[Array]:
    """Factors (side, rank) by alternating least squares."""
    from tensorly.decomposition import parafac

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more terms than a side is long: the start is filled up at random
        own = partial(parafac, tensor, rank, n_iter_max=iterations, init=init, tol=1e-7, random_state=0)
        try:
            weights, factors = own()
        except np.linalg.LinAlgError:  # terms that repeat each other, as of kernels that are zero but for one pixel
            weights, factors = own(l2_reg=_RIDGE)
    return [factors[0] * weights, *factors[1:]]


def _exact(weight: Array) -> list[Array]:
    """One term per fibre along the longest side."""
    longest = int(np.argmax(weight.shape))
    rest = [side for k, side in enumerate(weight.shape) if k != longest]
    fibres = np.moveaxis(weight, longest, 0).reshape(weight.shape[longest], -1)
    places = np.unravel_index(np.arange(fibres.shape[1]), rest)
    units = [np.eye(side)[:, place] for side, place in zip(rest, places, strict=True)]
    return [*units[:longest], fibres, *units[longest:]]
