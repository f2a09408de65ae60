"""The closed form against what it promises, on random data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.passes.fitting.regression import Facts, error_of, solve
from compressor.passes.statistics.moments import Moments


def data(seed=0, samples=400, features=8, targets=3):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64) @ mixing + 2
    matrix = torch.randn(targets, features, generator=generator, dtype=torch.float64)
    bias = torch.randn(targets, generator=generator, dtype=torch.float64)
    return x, matrix, bias


def facts_of(x, matrix, bias):
    moments = Moments()
    moments.add(x[:, None])
    return Facts.of_layer(moments.mean, moments.covariance, matrix[None], bias[None])


def kept(index, matrix):
    own = torch.tensor([index])
    return own, matrix[:, index][None]


def test_the_residual_is_the_measured_mean_square_error():
    x, matrix, bias = data()
    index, weights = kept([0, 2, 3, 6], matrix)
    found = solve(facts_of(x, matrix, bias).kept(index), weights, bias[None], ridge=0.0)
    y = x @ matrix.T + bias
    after = (y - x[:, index[0]] @ found.matrix[0].T - found.bias[0]).square().mean(0)
    before = (y - x[:, index[0]] @ weights[0].T - bias).square().mean(0)
    assert torch.allclose(found.after[0], after, rtol=1e-9)
    assert torch.allclose(found.before[0], before, rtol=1e-9)


def test_the_closed_form_is_that_of_the_paper_and_no_other_weights_are_better():
    x, matrix, bias = data()
    index = [1, 4, 5]
    facts = facts_of(x, matrix, bias)
    found = solve(facts.kept(torch.tensor([index])), matrix[:, index][None], bias[None], ridge=0.0)
    sigma, mean = torch.cov(x.T, correction=0), x.mean(0)
    expected = matrix @ sigma[:, index] @ torch.linalg.inv(sigma[index][:, index])
    assert torch.allclose(found.matrix[0], expected, atol=1e-9)
    assert torch.allclose(found.bias[0], bias + matrix @ mean - expected @ mean[index], atol=1e-9)
    least = torch.linalg.lstsq(torch.cat([x[:, index], torch.ones(len(x), 1)], 1), x @ matrix.T + bias).solution
    assert torch.allclose(found.matrix[0], least[:3].T, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 100.0]), st.integers(3, 400))
def test_compensated_is_never_above_uncompensated_whatever_the_ridge_and_however_few_samples(seed, count, ridge, samples):
    x, matrix, bias = data(seed, samples)
    index, weights = kept(sorted(torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:count].tolist()), matrix)
    found = solve(facts_of(x, matrix, bias).kept(index), weights, bias[None], ridge=ridge)
    assert (found.after <= found.before + 1e-9 * found.before.abs() + 1e-12).all()


def test_a_linear_combination_of_others_goes_without_a_loss():
    x, matrix, bias = data()
    x[:, 5] = 0.5 * x[:, 0] - 2 * x[:, 3] + 1
    facts = facts_of(x, matrix, bias)
    index, weights = kept([0, 1, 2, 3, 4, 6, 7], matrix)
    found = solve(facts.kept(index), weights, bias[None], ridge=1e-12)
    assert float(found.after.sum()) < 1e-10 * float(facts.target_variance.sum())
    assert float(found.before.sum()) > 1e-3 * float(facts.target_variance.sum())


def test_a_covariance_that_is_not_positive_definite_is_handled():
    x, matrix, bias = data()
    x[:, 1] = x[:, 0]
    x[:, 2] = 7.0
    found = solve(facts_of(x, matrix, bias), matrix[None], bias[None], ridge=0.0 + 1e-9)
    assert found.matrix.isfinite().all()
    assert float(found.after.sum()) < 1e-6


def test_rescaling_keeps_the_variance_of_every_output_and_costs_some_error():
    x, matrix, bias = data()
    facts = facts_of(x, matrix, bias)
    index, weights = kept([0, 2, 3], matrix)
    plain = solve(facts.kept(index), weights, bias[None], ridge=0.0)
    scaled = solve(facts.kept(index), weights, bias[None], ridge=0.0, rescale=True)
    made = (x[:, index[0]] @ scaled.matrix[0].T).var(0, correction=0)
    assert torch.allclose(made, (x @ matrix.T).var(0, correction=0), rtol=1e-9)
    assert (scaled.after > plain.after).all()


def test_the_error_of_any_weights_is_the_measured_one():
    x, matrix, bias = data()
    facts = facts_of(x, matrix, bias)
    other, shift = torch.randn_like(matrix), torch.randn_like(bias)
    measured = (x @ matrix.T + bias - x @ other.T - shift).square().mean(0)
    assert torch.allclose(error_of(facts, other[None], shift[None])[0], measured, rtol=1e-9)
    assert not torch.allclose(error_of(facts, matrix[None], shift[None])[0], measured, rtol=1e-2)


def test_blocks_are_independent():
    pieces = [data(seed) for seed in (1, 2)]
    moments = Moments()
    moments.add(torch.stack([x for x, _, _ in pieces], dim=1))
    matrix, bias = (torch.stack([piece[k] for piece in pieces]) for k in (1, 2))
    facts = Facts.of_layer(moments.mean, moments.covariance, matrix, bias)
    index = torch.tensor([[0, 1, 5], [2, 3, 7]])
    together = solve(facts.kept(index), matrix.gather(2, index[:, None].expand(-1, 3, -1)), bias)
    for k, (x, own, shift) in enumerate(pieces):
        alone = solve(facts_of(x, own, shift).kept(index[k : k + 1]), own[:, index[k]][None], shift[None])
        assert torch.allclose(together.matrix[k], alone.matrix[0], rtol=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
def test_keeping_everything_changes_nothing(rescale):
    x, matrix, bias = data()
    found = solve(facts_of(x, matrix, bias), matrix[None], bias[None], rescale=rescale)
    assert torch.allclose(found.matrix[0], matrix, atol=1e-8)
    assert torch.allclose(found.bias[0], bias, atol=1e-8)
