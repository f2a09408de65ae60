"""The weight of smaller rank that loses least of a layer's *output*: factorization that knows its data.

A form minimises the error of the weights. What counts is the error of what the layer makes, behind its norm:

    minimise E||s (W - W^) x||² = ||s (W - W^) C^(1/2)||²        C = Cov(x), s the scale of the norm

For `svd` the minimum is known (reduced-rank regression, Izenman 1975): with the r first eigenvectors U of s W C Wᵀ s,

    W^ = s^-1 U Uᵀ s W.

As W may be what compensation fitted, this is also the best layer of rank r for the compensated target. Other forms are applied
to the weight times the square root of the *channels'* covariance (its mean over the pixels of the kernel), which is then taken
back out of the first stage, and to the weight as it is; the output decides. The stages come along: what `cp` writes, which
has no closed form, would be written in another way, with an error, if it were factorized again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.passes.layers.forms import FORMS, Sizes, Stage, compose
from compressor.passes.layers.forms.base import Array
from compressor.values.plan import Factorization

_LEAST = 1e-6  # share of the mean variance below which a direction is not told from noise
_LEAST_SCALE = 1e-3  # of the largest scale of a norm


@dataclass(frozen=True, eq=False)
class Reduced:
    """A weight that a factorization writes.

    Attributes:
        matrix: (blocks, outputs, columns).
        stages: The sequence of every block; None for `svd`, which finds it in the matrix.
    """

    matrix: Tensor
    stages: Sequence[Sequence[Stage]] | None = None


def reduced(
    matrix: Tensor, sizes: Sizes, one: Factorization, covariance: Tensor | None = None, scale: Tensor | None = None
) -> Reduced:
    """The nearest weight that a factorization writes exactly.

    Args:
        matrix: (blocks, outputs, columns), float64.
        sizes: Of a block.
        one: The factorization.
        covariance: Of the columns, (blocks, columns, columns); without it the error of the weights counts.
        scale: Of the norm behind the layer, (blocks, outputs).
    """
    if covariance is None:
        covariance = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device).expand(len(matrix), -1, -1)
    factor = torch.ones_like(matrix[:, :, 0]) if scale is None else scale.abs()
    factor = factor.clamp_min(_LEAST_SCALE * float(factor.max()) + 1e-30)
    if one.form == "svd":
        return Reduced(torch.stack([_projected(*own, one.ranks[0]) for own in zip(matrix, covariance, factor, strict=True)]))
    stages = [_by_channels(m, c, f, sizes, one) for m, c, f in zip(matrix, covariance, factor, strict=True)]
    found = np.stack([compose(own).reshape(sizes.outputs, -1) for own in stages])
    return Reduced(torch.from_numpy(found).to(matrix), stages)


def energies(matrix: Tensor, covariance: Tensor, scale: Tensor) -> Tensor:
    """What each rank of an `svd` gives: the variance of the scaled output along its axes, (blocks, ranks), largest first.

    The tail behind rank r is the error that `reduced` leaves.
    """
    wide = matrix * scale.abs()[:, :, None]
    values: Tensor = torch.linalg.eigvalsh(wide @ covariance @ wide.transpose(1, 2)).clamp_min(0)
    return values.flip(1)[:, : min(matrix.shape[1:])]


def _projected(matrix: Tensor, covariance: Tensor, scale: Tensor, rank: int) -> Tensor:
    wide = matrix * scale[:, None]
    made = wide @ covariance @ wide.T
    vectors: Tensor = torch.linalg.eigh((made + made.T) / 2)[1]
    first = vectors[:, -rank:]
    return (first @ (first.T @ wide)) / scale[:, None]


def _by_channels(matrix: Tensor, covariance: Tensor, scale: Tensor, sizes: Sizes, one: Factorization) -> list[Stage]:
    pixels = matrix.shape[1] // sizes.inputs
    grid = covariance.reshape(sizes.inputs, pixels, sizes.inputs, pixels)
    mean = grid.diagonal(dim1=1, dim2=3).mean(-1)
    values, vectors = torch.linalg.eigh((mean + mean.T) / 2)
    roots = values.clamp_min(_LEAST * float(values.mean()) + 1e-30).sqrt()
    root, inverse = (((vectors * own) @ vectors.T).cpu().numpy() for own in (roots, 1 / roots))
    wide = matrix.cpu().numpy().reshape(sizes.outputs, sizes.inputs, *sizes.kernel)
    rows, nothing, same = scale.cpu().numpy(), np.ones(sizes.outputs), np.eye(sizes.inputs)

    def stages(mixing: Array, back: Array, own: Array) -> list[Stage]:
        weight = _times(wide, mixing) * own.reshape(-1, *[1] * (wide.ndim - 1))
        first, *others, last = FORMS[one.form].factorize(weight, one.ranks)
        unscaled = last.weight / own.reshape(-1, *[1] * (last.weight.ndim - 1))
        return [Stage(first.sizes, _times(first.weight, back)), *others, Stage(last.sizes, unscaled)]

    def lost(found: Sequence[Stage]) -> float:
        off = torch.from_numpy((compose(found) - wide).reshape(sizes.outputs, -1)).to(covariance) * scale[:, None]
        return float((off @ covariance * off).sum())

    return min((stages(*own) for own in ((root, inverse, rows), (same, same, rows), (same, same, nothing))), key=lost)


def _times(weight: Array, mixing: Array) -> Array:
    """A weight (outputs, inputs, *kernel) behind a mixing (inputs, inputs) of its channels."""
    return np.asarray(np.moveaxis(np.tensordot(weight, mixing, axes=(1, 0)), -1, 1))
