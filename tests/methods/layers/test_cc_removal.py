"""Units of a layer: scores against brute force, and what CC's published code gets wrong."""

import numpy as np
import pytest

from compressor.methods.layers.cc_rates import Exponential, fitted
from compressor.methods.layers.cc_removal import Layer, State, _Current, removal_path, sorted_path


def layer_of(weight, information=None, removable=True, ranks=True, seed=1):
    if information is None:
        information = np.random.default_rng(seed).standard_normal(weight.shape) ** 2
    return Layer(weight, information, np.full(weight.shape[1], removable), ranks)


def random_layer(shape=(8, 6, 9), **options):
    return layer_of(np.random.default_rng(0).standard_normal(shape), **options)


def forward_and_backward(layer, matrix, left):
    """The formula as it stands in the paper's code, with an SVD of its own."""
    h, w = (own.reshape(len(layer.weight), -1) for own in (layer.information, layer.weight))
    d = matrix - w
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    backward = (h * d**2).sum()
    inner = (h * matrix**2).sum() + (h * ((u**2 * s**2) @ v**2)).sum()
    return backward, backward - 4 / (left - 1) * (h * d * matrix).sum() + inner / (left - 1)


def test_scores_of_singular_values_are_those_of_brute_force():
    layer = random_layer()
    current = _Current(layer)
    current.remove([2], [7, 3])  # somewhere on the way
    _, scores = current.scores(0.9)
    u, s, v = np.linalg.svd(current._matrix, full_matrices=False)
    left = int(current.alive.sum()) + current.rank
    for k in range(current.rank):
        backward, forward = forward_and_backward(layer, current._matrix - s[k] * np.outer(u[:, k], v[k]), left)
        assert scores[k] == pytest.approx(backward + 0.9 * forward, rel=1e-5)  # float32 in the scores


def test_scores_of_channels_are_those_of_brute_force_but_for_the_shared_svd():
    layer = random_layer()
    current = _Current(layer)
    scores, _ = current.scores(0.9)
    left = 6 + 8
    for k in range(6):
        matrix = current._matrix.copy()
        matrix[:, 9 * k : 9 * k + 9] = 0
        backward, forward = forward_and_backward(layer, matrix, left)
        assert scores[k] == pytest.approx(backward + 0.9 * forward, rel=0.03)  # one of four sums is approximated
    plain, _ = current.scores(0.0)
    for k in range(6):
        matrix = current._matrix.copy()
        matrix[:, 9 * k : 9 * k + 9] = 0
        assert plain[k] == pytest.approx(layer.lost(matrix), rel=1e-5)


def test_the_look_ahead_is_the_mean_loss_after_one_more_unit():
    layer = random_layer((5, 4, 3))
    current = _Current(layer)
    w = layer.weight.reshape(5, -1)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    gone = s[4] * np.outer(u[:, 4], v[4])
    losses = [layer.lost(w - gone - s[k] * np.outer(u[:, k], v[k])) for k in range(4)]
    for k in range(4):
        column = np.zeros_like(w)
        column[:, 3 * k : 3 * k + 3] = (w - gone)[:, 3 * k : 3 * k + 3]
        losses.append(layer.lost(w - gone - column))
    _, with_ahead = current.scores(1.0)
    _, without = current.scores(0.0)
    assert with_ahead[4] - without[4] == pytest.approx(np.mean(losses), rel=1e-5)


def test_removing_does_not_touch_the_weights_that_it_is_compared_with():
    """The released code keeps a backup that aliases the weights on a CPU, and never restores a channel."""
    layer = random_layer()
    before = layer.weight.copy()
    current = _Current(layer)
    current.scores(0.9)
    current.remove([0, 1], [0])
    np.testing.assert_array_equal(layer.weight, before)
    assert current.lost > 0
    np.testing.assert_allclose(_Current(layer).scores(0.9)[0], _Current(random_layer()).scores(0.9)[0])


def test_each_removed_singular_value_is_another_one():
    """The released index map collapses to [0, 1, 1, 1, …] after a removal."""
    layer = layer_of(np.random.default_rng(3).standard_normal((6, 4, 3)), removable=False)
    path = removal_path(layer, share=1e-6, most=0.999)
    assert [state.kept for state in path] == [(0, 1, 2, 3)] * len(path)
    current, ranks = _Current(layer), []
    while current.rank > 1:
        _, scores = current.scores(0.9)
        current.remove([], [int(np.argmin(scores))])
        ranks.append(int(np.linalg.matrix_rank(current._matrix, tol=1e-9)))
    assert ranks == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.3])
def test_a_sensitivity_curve_takes_the_singular_values_of_the_whole_matrix_each_once(share):
    """Those that are left move up as others go: at every step they must be told by what they were."""
    weight = np.random.default_rng(3).standard_normal((12, 10, 3))
    layer = layer_of(weight, removable=False)
    u, s, v = np.linalg.svd(weight.reshape(12, -1), full_matrices=False)
    alone = [layer.lost((u * np.where(np.arange(12) == k, 0, s)) @ v) for k in range(12)]
    step = max(1, int(share * (10 + 12)))
    gone, expected = set(), [0.0]
    for start in range(0, 12, step):
        gone |= set(np.argsort(alone)[start : start + step].tolist())
        gone = set(sorted(gone, key=lambda k: alone[k])[:11])  # the last one stays
        expected.append(layer.lost((u * [0 if k in gone else own for k, own in enumerate(s)]) @ v))
    path = sorted_path(layer, share=share, most=1.0)
    np.testing.assert_allclose([state.loss for state in path], expected, rtol=1e-6, atol=1e-9)
    assert path[-1].rank == 1


def test_a_decomposition_that_saves_nothing_is_not_made():
    layer = random_layer(removable=False)
    path = removal_path(layer, share=1e-6)
    dense = 8 * 6 * 9
    for state in path:
        if state.rank is None:
            assert state.elements == dense
        else:
            assert state.elements == state.rank * (6 * 9 + 8) < dense
    assert path[0].rank is None
    assert path[-1].rank is not None


def test_what_must_stay_stays():
    fixed = np.array([True, False, True, False, True, True])
    layer = Layer(random_layer().weight, random_layer().information, fixed, True)
    for path in (removal_path(layer, most=0.999), sorted_path(layer, most=0.999)):
        assert all({1, 3} <= set(state.kept) for state in path)
        assert len(path[-1].kept) < 6
    channels_only = removal_path(random_layer(ranks=False), most=0.999)
    assert all(state.rank is None for state in channels_only)
    assert len(channels_only[-1].kept) == 1


def test_the_true_rank_of_a_low_rank_layer_is_found():
    random = np.random.default_rng(0)
    weight = (random.standard_normal((16, 3)) @ random.standard_normal((3, 8 * 9))).reshape(16, 8, 9)
    path = removal_path(layer_of(weight, removable=False), share=1e-6)
    exact = [state for state in path if state.loss < 1e-12 * float((weight**2).sum())]
    assert exact[-1].rank == 3
    assert path[path.index(exact[-1]) + 1].loss > 1e-3


def test_redundant_channels_and_redundant_rank_are_both_cut_without_loss():
    random = np.random.default_rng(0)
    weight = (random.standard_normal((16, 4)) @ random.standard_normal((4, 8 * 9))).reshape(16, 8, 9)
    weight[:, [2, 5, 7]] = 0.0
    layer = layer_of(weight)
    path = removal_path(layer, share=1e-6)
    exact = [state for state in path if state.loss < 1e-12 * float((weight**2).sum())]
    assert exact[-1].kept == (0, 1, 3, 4, 6)
    assert exact[-1].rank == 4


def state(elements, loss, whole=1000):
    return State((0,), None, loss, elements)


def test_an_exponential_is_fitted_to_what_is_one():
    path = [state(1000, 0.0)] + [state(1000 - 10 * k, 0.002 * np.exp(0.05 * k)) for k in range(1, 90)]
    p1, p2 = fitted(path)
    assert p2 == pytest.approx(5.0, rel=1e-3)
    assert p1 == pytest.approx(0.002 / (0.002 * np.exp(0.05 * 89)), rel=1e-2)


def test_squares_of_the_fit_are_weighted_by_the_root_of_the_loss():
    path = [state(1000, 0.0)] + [state(1000 - 10 * k, 0.001 * k + 2e-5 * k**2) for k in range(1, 90)]
    rates = np.array([1 - own.elements / 1000 for own in path[1:]])
    losses = np.array([own.loss for own in path[1:]]) / path[-1].loss

    def error(p1, p2):
        return float((np.sqrt(losses) * (np.log(losses) - np.log(p1) - p2 * rates) ** 2).sum())

    p1, p2 = fitted(path)
    assert error(p1, p2) < min(
        error(p1 * a, p2 * b) for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99), (1.01, 0.99), (0.99, 1.01))
    )


def test_the_published_rates_solve_the_published_problem():
    """Minimise sum F p1 exp(p2 c) for what is saved: at the optimum all slopes per MAC are equal, or the rate is at its bound."""
    curves = {"a": (0.02, 4.0), "b": (0.5, 2.0), "c": (0.001, 9.0)}
    paths = {name: [state(1000 - k, k * 1e-3) for k in range(960)] for name in curves}
    rates = Exponential(curves, paths).rates(0.4)
    slopes = [p1 * p2 * np.exp(p2 * c) for (p1, p2), c in zip(curves.values(), rates, strict=True)]
    inside = [s for s, c in zip(slopes, rates, strict=True) if 0 < c < 0.95]
    assert len(inside) >= 2
    assert max(inside) == pytest.approx(min(inside), rel=1e-9)
    found = Exponential(curves, paths)(0.4)
    for name, c in zip(curves, rates, strict=True):
        assert found[name].elements == pytest.approx(1000 * (1 - c), abs=1.0)
