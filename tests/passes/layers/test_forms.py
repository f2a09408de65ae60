"""Factorized forms against tensorly's own reconstructions and against the weights themselves."""

import itertools

import numpy as np
import pytest
import tensorly
from tensorly.decomposition import parafac, partial_tucker, tensor_train

from compressor.passes.layers.forms import FORMS, Sizes, compose

SHAPES = {
    "2d": (8, 6, 3, 3),
    "uneven": (6, 8, 3, 5),
    "1d": (6, 8, 5),
    "3d": (5, 4, 3, 2, 3),
    "pointwise": (9, 6, 1, 1),
    "linear": (12, 7),
}


def weight(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def sizes(shape):
    return Sizes(shape[0], shape[1], tuple(shape[2:]))


def error(form, w, ranks):
    return float(np.linalg.norm(compose(form.factorize(w, ranks)) - w) / np.linalg.norm(w))


CASES = [(f, s) for f in FORMS for s in SHAPES if FORMS[f].refuses(sizes(SHAPES[s])) is None]


def test_every_form_takes_a_plain_kernel_and_says_why_it_refuses_another():
    assert {form for form, shape in CASES if shape == "2d"} == set(FORMS)
    assert {form for form, shape in CASES if shape == "linear"} == {"svd"}
    for form in FORMS.values():
        assert form.refuses(Sizes(1, 1, (1, 1)))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_at_full_rank_the_weight_comes_back(name, shape):
    form, w = FORMS[name], weight(SHAPES[shape])
    assert error(form, w, form.full(sizes(SHAPES[shape]))) < 1e-13  # float64: some tens of roundings


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_error_falls_with_the_rank(name, shape):
    form, w = FORMS[name], weight(SHAPES[shape], seed=1)
    full = form.full(sizes(SHAPES[shape]))
    path = [tuple(max(1, round(share * rank)) for rank in full) for share in (0.2, 0.4, 0.6, 0.8, 1.0)]
    errors = [error(form, w, ranks) for ranks in dict.fromkeys(path)]
    assert all(after < before for before, after in itertools.pairwise(errors)), errors
    assert errors[0] > 0.1  # and it is an error: a random tensor has no low rank


def test_with_every_single_term_more_cp_comes_nearer():
    """By alternating least squares from the singular vectors alone it does not."""
    w = weight((6, 5, 3, 2), seed=2)
    errors = [error(FORMS["cp"], w, (rank,)) for rank in range(1, 31)]
    assert all(after < before for before, after in itertools.pairwise(errors)), errors


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_stages_are_as_large_as_announced(name, shape):
    form, own = FORMS[name], sizes(SHAPES[shape])
    ranks = tuple(max(1, rank // 2) for rank in form.full(own))
    found = form.factorize(weight(SHAPES[shape]), ranks)
    assert [stage.sizes for stage in found] == form.stages(own, ranks)
    assert [stage.weight.size for stage in found] == [stage.elements(own.kernel) for stage in form.stages(own, ranks)]
    assert (found[0].sizes.inputs, found[-1].sizes.outputs) == (own.inputs, own.outputs)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[0] != "cp"])
def test_a_weight_of_that_rank_is_found_exactly(name, shape):
    form, own = FORMS[name], sizes(SHAPES[shape])
    ranks = tuple(max(1, rank // 2) for rank in form.full(own))
    low = compose(form.factorize(weight(SHAPES[shape]), ranks))
    assert error(form, low, ranks) < 1e-12


@pytest.mark.parametrize("rank", [1, 20, 40])
def test_cp_of_weights_that_few_terms_write(rank):
    """More terms than there is something for: the normal equations are singular."""
    weight = np.random.default_rng(0).normal(size=(6, 8, 3, 3))
    weight[:, :, [0, 0, 2, 2], [0, 2, 0, 2]] = weight[:, :, 1, ::2] = weight[:, :, ::2, 1] = 0  # a 1 x 1 kernel, so of rank 6
    norms = [np.linalg.norm(compose(FORMS["cp"].factorize(own, (rank,))) - own) for own in (weight, 0 * weight)]
    assert norms[0] < (1e-10 if rank > 1 else np.linalg.norm(weight))
    assert norms[1] == 0


def test_cp_finds_a_sum_of_few_terms():
    form, own = FORMS["cp"], sizes(SHAPES["2d"])
    low = compose(form.factorize(weight(SHAPES["2d"]), (3,)))
    assert error(form, low, (3,)) < 1e-3  # alternating least squares: near it, not at it
    assert error(form, low, (2,)) > 1e-2
    assert form.full(own) == (54,)


def test_tensorly_reconstructs_the_same():
    w = weight(SHAPES["2d"])
    core, _ = partial_tucker(w, rank=[5, 3], modes=[0, 1], init="svd", n_iter_max=20)
    tucker = tensorly.tenalg.multi_mode_dot(core[0], core[1], modes=[0, 1])
    np.testing.assert_allclose(compose(FORMS["tucker2"].factorize(w, (3, 5))), tucker, atol=1e-12)
    train = tensor_train(np.moveaxis(w, 0, -1), rank=[1, 4, 9, 5, 1]).to_tensor()
    np.testing.assert_allclose(compose(FORMS["tensor_train"].factorize(w, (4, 9, 5))), np.moveaxis(train, -1, 0), atol=1e-12)
    first, *axes, last = (stage.weight for stage in FORMS["cp"].factorize(w, (3,)))
    factors = [last[:, :, 0, 0], first[:, :, 0, 0].T, axes[0][:, 0, :, 0].T, axes[1][:, 0, 0].T]
    np.testing.assert_allclose(compose(FORMS["cp"].factorize(w, (3,))), tensorly.cp_to_tensor((np.ones(3), factors)), atol=1e-12)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD:UserWarning")
@pytest.mark.parametrize("rank", [3, 10, 30])
def test_cp_is_as_near_as_tensorlys_own(rank):
    w = weight(SHAPES["2d"])
    unit = w / np.linalg.norm(w)
    terms = parafac(unit, rank, n_iter_max=200, init="svd", tol=1e-7, random_state=0)
    theirs = float(np.linalg.norm(tensorly.cp_to_tensor(terms) - unit))
    assert error(FORMS["cp"], w, (rank,)) < 1.01 * theirs, "both are local minima"


def test_svd_keeps_the_energy_of_the_largest_singular_values():
    w = weight((7, 5, 3, 3))
    values = np.linalg.svd(w.reshape(7, -1), compute_uv=False)
    for rank in (1, 4, 6):
        lost = np.linalg.norm(compose(FORMS["svd"].factorize(w, (rank,))) - w) ** 2
        assert lost == pytest.approx((values[rank:] ** 2).sum(), rel=1e-10)
