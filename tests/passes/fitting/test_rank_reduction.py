"""Factorization that knows its data: the least error of the output, not of the weights."""

import numpy as np
import pytest
import torch

import compressor
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.rank_reduction import energies, reduced
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.forms import FORMS, Sizes, compose
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.transforms.apply_plan import applied
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.values.plan import Factorization, Plan
from tests.passes.transforms.test_factorize_conv import factors, residual

SIZES = Sizes(10, 4, (3, 3))


def parts(seed=0):
    random = np.random.default_rng(seed)
    matrix = torch.from_numpy(random.standard_normal((1, 10, 36)))
    root = torch.from_numpy(random.standard_normal((36, 36)) * np.geomspace(3, 0.03, 36))
    return matrix, (root @ root.T)[None], torch.from_numpy(random.uniform(0.2, 2.0, (1, 10)))


def lost(matrix, found, covariance, scale):
    off = (found - matrix) * scale[:, :, None]
    return float((off @ covariance * off).sum())


def test_the_output_error_of_an_svd_is_the_tail_of_the_energies():
    matrix, covariance, scale = parts()
    tail = energies(matrix, covariance, scale)[0]
    for rank in (1, 4, 9, 10):
        found = reduced(matrix, SIZES, Factorization("x", "svd", (rank,)), covariance, scale).matrix
        assert lost(matrix, found, covariance, scale) == pytest.approx(float(tail[rank:].sum()), rel=1e-8, abs=1e-9)
        assert int(torch.linalg.matrix_rank(found[0])) == rank


@pytest.mark.parametrize("form", [name for name in FORMS if name != "cp"])
def test_it_is_never_worse_than_the_plain_form_and_the_form_writes_it_exactly(form):
    matrix, covariance, scale = parts()
    full = FORMS[form].full(SIZES)
    one = Factorization("x", form, tuple(max(1, rank // 2) for rank in full))
    found = reduced(matrix, SIZES, one, covariance, scale).matrix
    plain = reduced(matrix, SIZES, one).matrix
    again = compose(FORMS[form].factorize(found[0].numpy().reshape(10, 4, 3, 3), one.ranks)).reshape(10, -1)
    np.testing.assert_allclose(again, found[0].numpy(), atol=1e-9)
    assert lost(matrix, found, covariance, scale) <= (0.9 if form == "svd" else 1.0) * lost(matrix, plain, covariance, scale)


def test_without_data_it_is_the_plain_form():
    matrix, *_ = parts()
    one = Factorization("x", "svd", (4,))
    plain = compose(FORMS["svd"].factorize(matrix[0].numpy().reshape(10, 4, 3, 3), (4,))).reshape(1, 10, 36)
    np.testing.assert_allclose(reduced(matrix, SIZES, one).matrix.numpy(), plain, atol=1e-10)


def images(count=192):
    torch.manual_seed(1)
    base = torch.randn(count, 3, 8, 8)
    return Calibration.read([(x,) for x in base.split(32)], residual(), count)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", ["original", "narrowed"])
def test_compensation_fits_the_layer_that_the_factorization_writes(features, form):
    graph = residual()
    channels = compressor.analyze(graph)
    kept = dict(channels.plan(0.25).kept)
    narrowed = applied(Plan.keep(kept, channels.digest), channels)
    factored = [factors(narrowed, layer, form, {"svd": 0.25, "cp": 0.2}.get(form, 0.6)) for layer in "ab"]
    plan = Plan.keep(kept, channels.digest, factors=factored)
    settings = Compensation(features, ridge=1e-6, images=192)
    found = Compensate(channels, plan, images(), settings).run(narrowed)
    built = FactorizeConv(plan.factors)(found.graph).graph
    blind = applied(plan, channels)
    x = torch.cat([batch[0] for batch in images().batches])
    with torch.no_grad():
        whole, kept = graph(x), found.graph(x)
        torch.testing.assert_close(built(x), kept, atol=1e-4, rtol=1e-4)  # nothing more is lost by writing it as a sequence
        assert float((kept - whole).norm()) < (0.6 if form == "svd" else 0.8) * float((blind(x) - whole).norm())
    assert {repair.layer for repair in found.repairs} >= {"a", "b"}


def test_a_layer_that_is_only_factorized_is_fitted_too():
    graph = residual()
    channels = compressor.analyze(graph)
    plan = Plan.keep({}, channels.digest, factors=[factors(graph, "b", "svd", 0.3)])
    found = Compensate(channels, plan, images(), Compensation("original", images=192)).run(graph)
    (repair,) = found.repairs
    assert repair.layer == "b"
    assert 0 < repair.after < 0.5
    rank = plan.factors[0].ranks[0]
    values = torch.linalg.svdvals(found.graph.get_submodule("b").weight.detach().double().reshape(16, -1))
    assert float(values[rank:].max()) < 1e-5 * float(values[0])
