"""`Moments`: in parts = at once, in float64."""

import torch

from compressor.passes.statistics.moments import Moments


def test_moments_in_parts_are_those_of_the_whole():
    x, y = torch.randn(500, 2, 5) * 3 + 1, torch.randn(500, 2, 3)
    moments = Moments(chunk=640)
    for a, b in zip(x.split(170), y.split(170), strict=True):
        moments.add(a, b)
    both = torch.cat([x, y], dim=2).double()
    for block in range(2):
        whole = torch.cov(both[:, block].T, correction=0)
        assert torch.allclose(moments.covariance[block], whole[:5, :5], atol=1e-12)
        assert torch.allclose(moments.cross[block], whole[5:, :5], atol=1e-12)
        assert torch.allclose(moments.target_variance[block], whole.diagonal()[5:], atol=1e-12)
    assert torch.allclose(moments.mean, x.double().mean(0))
    assert torch.allclose(moments.target_mean, y.double().mean(0))
    assert moments.count == 500


def test_a_small_variance_beside_a_large_mean_keeps_its_digits():
    x = torch.randn(4000, 1, 1, dtype=torch.float64) * 1e-3 + 1e6
    moments = Moments()
    moments.add(x)
    naive = float((x**2).mean() - x.mean() ** 2)
    exact = float(x.var(correction=0))
    assert abs(float(moments.covariance) - exact) < 1e-6 * exact
    assert abs(naive - exact) > 1e-2 * exact, "the naive formula would have done as well"


def test_a_constant_feature_has_a_variance_of_exactly_zero():
    moments = Moments()
    for _ in range(3):
        moments.add(torch.full((100, 1, 1), 0.1))
    assert float(moments.covariance) == 0.0
