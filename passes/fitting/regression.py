"""The closed form of pruning with compensation: a layer's weights for the inputs that stay.

Minimise E||y - W' x_S - b'||² + r ||W' - W_S||² over W' and b', where y is what the layer should give, x_S the inputs
that stay, W_S its weights on them, and r the ridge times the mean variance of x_S (papers: CaP, section "Compensation"):

    W' = (Cov(y, x_S) + r W_S) (Cov(x_S) + r I)^-1        b' = E[y] - W' E[x_S]

With y = W x + b this is W' = W Σ[:, S] Σ_SS^-1 and b' = b + W μ - W' μ_S, as published. The ridge pulls towards the
weights that are there instead of towards zero: where the data say nothing, nothing changes, and the result is
never worse on these data than W_S, whatever the ridge.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_RIDGE = 1e-12
_RIDGES = 8  # how often the ridge is raised tenfold where the covariance is not positive definite


@dataclass(frozen=True)
class Facts:
    """What the closed form needs to know; all float64, with a leading axis for blocks.

    Attributes:
        mean: E[x_S], (blocks, features).
        covariance: Of x_S, (blocks, features, features).
        target_mean: E[y], (blocks, targets).
        target_variance: Per target, (blocks, targets).
        cross: Cov(y, x_S), (blocks, targets, features).
    """

    mean: Tensor
    covariance: Tensor
    target_mean: Tensor
    target_variance: Tensor
    cross: Tensor

    def kept(self, index: Tensor) -> "Facts":
        """For fewer features: `index` is (blocks, kept)."""
        rows = index[:, :, None].expand(-1, -1, self.covariance.shape[2])
        covariance = self.covariance.gather(1, rows).gather(2, index[:, None, :].expand(-1, index.shape[1], -1))
        cross = self.cross.gather(2, index[:, None, :].expand(-1, self.cross.shape[1], -1))
        return Facts(self.mean.gather(1, index), covariance, self.target_mean, self.target_variance, cross)

    @classmethod
    def of_layer(cls, mean: Tensor, covariance: Tensor, matrix: Tensor, bias: Tensor) -> "Facts":
        """Where the target is what the layer makes of these same features: y = W x + b.

        Args:
            mean: (blocks, features).
            covariance: (blocks, features, features).
            matrix: (blocks, targets, features).
            bias: (blocks, targets).
        """
        cross = matrix @ covariance
        target = (matrix @ mean[:, :, None])[:, :, 0] + bias
        return cls(mean, covariance, target, (cross * matrix).sum(2), cross)


@dataclass(frozen=True)
class Solution:
    """New weights, and what they leave of the error.

    Attributes:
        matrix: W', (blocks, targets, features).
        bias: b', (blocks, targets).
        before: E||y - W_S x_S - b||² per target, uncompensated, (blocks, targets).
        after: E||y - W' x_S - b'||² per target.
        ridge: The one that was needed, as a share of the mean variance.
    """

    matrix: Tensor
    bias: Tensor
    before: Tensor
    after: Tensor
    ridge: float


def solve(facts: Facts, matrix: Tensor, bias: Tensor, ridge: float = 1e-6, rescale: bool = False) -> Solution:
    """Fit a layer to its target.

    Args:
        facts: Moments of the features that stay and of the targets.
        matrix: W_S, (blocks, targets, features).
        bias: (blocks, targets).
        ridge: Share of the mean variance; raised where the covariance is not positive definite.
        rescale: Scale each row so that its output has the target's variance, as the released code does (for
            layers that a batch norm follows). The error grows a little by it.
    """
    scale = facts.covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(facts.covariance.shape[1], dtype=torch.float64, device=scale.device)
    before = error_of(facts, matrix, bias)
    for step in range(_RIDGES):
        share = ridge if not step else max(ridge, _LEAST_RIDGE) * 10.0**step
        amount = (share * scale)[:, None, None]
        factor, info = torch.linalg.cholesky_ex(facts.covariance + amount * identity)
        if not bool(info.any()):
            break
    else:
        return Solution(matrix, bias, before, before, 1e300)
    wanted = (facts.cross + amount * matrix).transpose(1, 2)
    found = torch.cholesky_solve(wanted, factor).transpose(1, 2)
    if rescale:
        made = (found @ facts.covariance * found).sum(2)
        found = found * torch.where(made > 0, (facts.target_variance / made.clamp_min(1e-300)).clamp_min(0).sqrt(), 1.0)[:, :, None]
    own = facts.target_mean - (found @ facts.mean[:, :, None])[:, :, 0]
    return Solution(found, own, before, error_of(facts, found, own), share)


def solve_held_out(
    halves: Sequence[tuple[Facts, int]], matrix: Tensor, bias: Tensor, ridges: Sequence[float], rescale: bool = False
) -> tuple[Solution, float]:
    """Fit on everything, with the ridge whose fit on one half has the smallest error on the other.

    With few samples for many features the plain closed form fits noise. A large ridge leaves the weights as they are and fits
    the bias alone.

    Args:
        halves: Two sets of facts from different images, and how many samples each rests on.
        matrix: See `solve`.
        bias: See `solve`.
        ridges: Those that are tried.
        rescale: See `solve`.

    Returns:
        The solution, and its error on the half that the fit had not seen, summed over targets.
    """
    (first, _), (second, _) = halves
    errors = {}
    for share in ridges:
        found = solve(first, matrix, bias, share, rescale)
        errors[share] = float(error_of(second, found.matrix, found.bias).sum())
    best = min(errors, key=errors.__getitem__)
    return solve(pooled(halves), matrix, bias, best, rescale), errors[best]


def pooled(halves: Sequence[tuple[Facts, int]]) -> Facts:
    """The facts of all samples together."""
    (a, m), (b, n) = halves
    p, q = m / (m + n), n / (m + n)
    x, y = a.mean - b.mean, a.target_mean - b.target_mean
    return Facts(
        p * a.mean + q * b.mean,
        p * a.covariance + q * b.covariance + p * q * x[:, :, None] * x[:, None, :],
        p * a.target_mean + q * b.target_mean,
        p * a.target_variance + q * b.target_variance + p * q * y.square(),
        p * a.cross + q * b.cross + p * q * y[:, :, None] * x[:, None, :],
    )


def error_of(facts: Facts, matrix: Tensor, bias: Tensor) -> Tensor:
    """E||y - W x - b||² per target, (blocks, targets)."""
    spread = facts.target_variance - 2 * (matrix * facts.cross).sum(2) + (matrix @ facts.covariance * matrix).sum(2)
    offset = facts.target_mean - (matrix @ facts.mean[:, :, None])[:, :, 0] - bias
    return spread.clamp_min(0) + offset.square()
