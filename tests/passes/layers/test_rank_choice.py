"""Ranks: by energy, by rate and by variational Bayes."""

import numpy as np
import pytest

from compressor.passes.layers.forms import FORMS, Sizes, compose
from compressor.passes.layers.rank_choice import by_energy, by_rate, by_vbmf, spectra, vbmf_rank

SIZES = Sizes(12, 10, (3, 3))


def weight(seed=0):
    return np.random.default_rng(seed).standard_normal((12, 10, 3, 3))


@pytest.mark.parametrize("form", ["svd", "spatial_svd", "tucker2", "tensor_train"])
def test_ranks_by_energy_keep_that_share_of_it(form):
    own, w = FORMS[form], weight()
    for share in (0.5, 0.8, 0.95):
        ranks = by_energy(spectra(own, [w]), share)
        for rank, matrix in zip(ranks, own.unfoldings(w), strict=True):
            values = np.linalg.svd(matrix, compute_uv=False) ** 2
            assert values[:rank].sum() >= share * values.sum() * (1 - 1e-9)
            assert rank == 1 or values[: rank - 1].sum() < share * values.sum()
        lost = np.linalg.norm(compose(own.factorize(w, ranks)) - w) ** 2 / np.linalg.norm(w) ** 2
        assert lost <= len(ranks) * (1 - share) + 1e-9  # each unfolding loses at most its share
    assert by_energy(spectra(own, [w]), 1.0) == own.full(SIZES)


def test_what_is_zero_gets_the_least_rank():
    for form in ("svd", "tucker2"):
        least = tuple(1 for _ in FORMS[form].full(SIZES))
        assert by_energy(spectra(FORMS[form], [np.zeros((12, 10, 3, 3))]), 0.9) == least


def test_several_blocks_get_the_ranks_that_all_of_them_need():
    low = compose(FORMS["svd"].factorize(weight(), (2,)))
    assert by_energy(spectra(FORMS["svd"], [low]), 1 - 1e-9) == (2,)
    assert by_energy(spectra(FORMS["svd"], [low, weight()]), 1 - 1e-9) == (12,)


def test_what_has_no_unfoldings_has_no_energy():
    assert by_energy(spectra(FORMS["cp"], [weight()]), 0.9) is None
    assert by_vbmf(FORMS["cp"], [weight()]) is None


@pytest.mark.parametrize("form", FORMS)
def test_ranks_by_rate_cost_at_most_that_and_hardly_less(form):
    own = FORMS[form]
    for rate in (0.3, 0.6):
        ranks = by_rate(own, SIZES, rate)
        cost = sum(stage.elements(SIZES.kernel) for stage in own.stages(SIZES, ranks))
        assert cost <= rate * SIZES.elements
        assert all(1 <= rank <= most for rank, most in zip(ranks, own.full(SIZES), strict=True))
        wider = [min(rank + 1, most) for rank, most in zip(ranks, own.full(SIZES), strict=True)]
        assert sum(stage.elements(SIZES.kernel) for stage in own.stages(SIZES, wider)) > rate * SIZES.elements
    assert by_rate(own, SIZES, 1e-6) is None


@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (60, 60)])
def test_variational_bayes_finds_the_rank_behind_the_noise(rank, shape):
    random = np.random.default_rng(rank)
    signal = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1]))
    matrix = signal + 0.5 * random.standard_normal(shape)
    assert [vbmf_rank(scale * matrix) for scale in (1.0, 3e-3, 1e-6, 1e4)] == [rank] * 4


def test_variational_bayes_of_degenerate_matrices():
    assert vbmf_rank(np.zeros((5, 7))) == 0
    assert by_vbmf(FORMS["svd"], [np.zeros((5, 7))]) == (1,)
    exact = np.random.default_rng(0).standard_normal((20, 4)) @ np.random.default_rng(1).standard_normal((4, 30))
    assert vbmf_rank(exact) == 4
