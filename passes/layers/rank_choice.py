"""Which ranks a layer gets: by the energy of its unfoldings, by what it may cost, or by variational Bayes.

energy  the smallest ranks whose unfoldings keep a share of their squared singular values
rate    the largest ranks, all the same share of the full ones, at which the sequence costs a share of the layer
vbmf    the rank above the noise: the global analytic solution of empirical variational Bayesian matrix
factorization (Nakajima et al., JMLR 2013), for each unfolding
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from compressor.passes.layers.forms import Form, Sizes, StageSizes
from compressor.passes.layers.forms.base import Array

_STEPS = 30


def spectra(form: Form, weights: Sequence[Array]) -> list[list[Array]]:
    """Squared singular values, largest first, of every unfolding (the inner lists) of every block."""
    return [[_squares(matrix) for matrix in form.unfoldings(weight)] for weight in weights]


def by_energy(energies: Sequence[Sequence[Array]], share: float) -> tuple[int, ...] | None:
    """Ranks that keep a share of the energy of every block's unfoldings; None where the form has none.

    Args:
        energies: `spectra` of a layer.
        share: 0 to 1.
    """
    found = [[_energy_rank(values, share) for values in own] for own in energies]
    return tuple(max(own) for own in zip(*found, strict=True)) or None


def by_vbmf(form: Form, weights: Sequence[Array]) -> tuple[int, ...] | None:
    """Ranks above the noise, at least 1; None where the form has no unfoldings."""
    found = [[max(vbmf_rank(matrix), 1) for matrix in form.unfoldings(weight)] for weight in weights]
    return tuple(max(own) for own in zip(*found, strict=True)) or None


def by_rate(
    form: Form, sizes: Sizes, rate: float, share_of: Callable[[Sequence[StageSizes]], float] | None = None
) -> tuple[int, ...] | None:
    """The largest ranks at which the sequence costs at most a share of the layer; None where even ranks of 1 cost more.

    Args:
        form: The form.
        sizes: Of a block.
        rate: 0 to 1.
        share_of: What a sequence costs, as a share of the layer; by default its elements.
    """
    full = form.full(sizes)

    def at(share: float) -> tuple[int, ...]:
        return tuple(max(1, math.floor(share * rank)) for rank in full)

    def cost(ranks: tuple[int, ...]) -> float:
        stages = form.stages(sizes, ranks)
        return share_of(stages) if share_of else sum(stage.elements(sizes.kernel) for stage in stages) / sizes.elements

    limit = rate * (1 + 1e-12)
    if cost(at(0.0)) > limit:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if cost(at(middle)) <= limit else (low, middle)
    return at(low)


def _squares(matrix: Array) -> Array:
    return np.asarray(np.linalg.svd(matrix, compute_uv=False) ** 2, dtype=np.float64)


def _energy_rank(values: Array, share: float) -> int:
    if not values.any():
        return 1  # what is zero takes no rank, and a sequence has at least one
    kept = np.cumsum(values) / values.sum()
    return min(int(np.searchsorted(kept, share * (1 - 1e-12))) + 1, len(values))


def vbmf_rank(matrix: Array) -> int:
    """How many singular values of a matrix are above the noise, whose variance is estimated as well.

    With L <= M the sides, a = L / M and x = s² / (M variance), a singular value counts where
    x > (1 + t)(1 + a / t), t = 2.5129 sqrt(a); the variance minimises the free energy. The scale of the matrix does not matter.
    """
    rows, columns = sorted(matrix.shape)
    ratio = rows / columns
    values = _squares(matrix)
    if values.sum() <= 0:
        return 0
    values = values * (matrix.size / values.sum())  # elements of mean square 1: the minimum is looked for on an absolute scale
    threshold = 2.5129 * math.sqrt(ratio)
    bound = (1 + threshold) * (1 + ratio / threshold)
    tail = min(math.ceil(rows / (1 + ratio)) - 1, rows - 1)
    upper = float(values.sum()) / (rows * columns)
    lower = max(float(values[tail]) / (columns * bound), float(values[tail:].mean()) / columns, 1e-12 * upper)
    if lower < upper:
        found = minimize_scalar(_free_energy, args=(values / columns, ratio, bound), bounds=(lower, upper), method="bounded")
        variance = float(found.x)
    else:
        variance = lower
    return int((values > columns * variance * bound).sum())


def _free_energy(variance: float, values: Array, ratio: float, bound: float) -> float:
    """Of the noise's variance, up to a constant (theorem 2 there)."""
    x = np.maximum(values / variance, 1e-300)
    above, below = x[x > bound], x[x <= bound]
    t = 0.5 * (above - (1 + ratio) + np.sqrt((above - (1 + ratio)) ** 2 - 4 * ratio))
    found = (below - np.log(below)).sum() + (above - t).sum() + np.log((t + 1) / above).sum()
    return float(found + ratio * np.log(t / ratio + 1).sum())
