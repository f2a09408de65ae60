"""Conformance of every criterion, and what each one means."""

import numpy as np
import pytest
import torch
from torch import nn

import compressor
from compressor.passes.criteria import CRITERIA, Scoring, select
from compressor.training.gradients import mean_gradients
from tests.networks import Residual, randomize

X = (torch.randn(2, 3, 8, 8),)
DATA = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])) for _ in range(2)]


def scores_of(name, model, **options):
    channels = compressor.analyze(compressor.trace(model, X))
    gradients = mean_gradients(channels.graph, DATA) if name == "taylor" else None
    scoring = Scoring(channels, gradients)
    criterion = CRITERIA[name](**options)
    return {group.name: criterion(scoring, group) for group in channels.groups}


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_one_per_unit_and_reproducible(name):
    model = randomize(Residual())
    first, second = scores_of(name, model), scores_of(name, model)
    assert {group: len(s) for group, s in first.items()} == {"stem": 8, "conv1": 12, "fc": 5}
    for group, scores in first.items():
        assert np.isfinite(scores).all()
        assert (scores == second[group]).all()


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
def test_scores_follow_their_channels_when_the_order_changes(name):
    model = randomize(Residual())
    before = scores_of(name, model)["conv1"]
    order = torch.randperm(12)
    with torch.no_grad():
        for tensor in (model.conv1.weight, *model.bn1.state_dict().values()):
            if tensor.dim():
                tensor.copy_(tensor[order].clone())
        model.conv2.weight.copy_(model.conv2.weight[:, order].clone())
    np.testing.assert_allclose(scores_of(name, model)["conv1"], before[order.numpy()], rtol=1e-4)  # float32 sums


def two_layers(first):
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first).view(3, 3, 1, 1))
    return model


def test_l1_and_l2_are_norms_over_the_mean_of_the_group():
    rows = [[3.0, -4.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 2.0]]
    np.testing.assert_allclose(scores_of("l1", two_layers(rows), normalize=False)["0"], [7, 3, 2])
    np.testing.assert_allclose(scores_of("l1", two_layers(rows))["0"], np.array([7, 3, 2]) / 4)
    np.testing.assert_allclose(scores_of("l2", two_layers(rows), normalize=False)["0"], [5, 3**0.5, 2], rtol=1e-6)


def test_geometric_median_ranks_the_filter_in_the_middle_last():
    scores = scores_of("geometric-median", two_layers([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [9.0, 0.0, 0.0]]), normalize=False)["0"]
    np.testing.assert_allclose(scores, [10, 9, 17])


def test_batchnorm_scale_reads_gamma():
    model = randomize(Residual())
    with torch.no_grad():
        model.bn1.weight.copy_(-torch.arange(1.0, 13.0))
    np.testing.assert_allclose(scores_of("batchnorm-scale", model, normalize=False)["conv1"], np.arange(1, 13))


def test_taylor_is_the_squared_first_order_change_of_the_loss():
    model = randomize(Residual())
    graph = compressor.trace(model, X)
    gradient = mean_gradients(graph, DATA)["conv1.weight"]
    expected = (gradient * model.conv1.weight).detach().flatten(1).sum(1).square()
    np.testing.assert_allclose(scores_of("taylor", model, normalize=False)["conv1"], expected.numpy(), rtol=1e-5)


def test_tied_filters_are_aggregated_as_asked():
    model = randomize(Residual())
    norms = [layer.weight.detach().abs().flatten(1).sum(1).double().numpy() for layer in (model.stem, model.conv2)]
    for name, expected in (("sum", norms[0] + norms[1]), ("mean", (norms[0] + norms[1]) / 2), ("max", np.maximum(*norms))):
        np.testing.assert_allclose(scores_of("l1", model, aggregate=name, normalize=False)["stem"], expected, rtol=1e-6)


def test_nan_in_weights_is_refused():
    model = Residual()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(compressor.DataError, match=r"conv1.weight.*NaN"):
        scores_of("l1", model)


def test_select_takes_equally_many_from_every_cell():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 4, 1))
    group = compressor.analyze(compressor.trace(model, X)).groups[0]
    assert select(group, np.arange(12.0), 6) == [2, 3, 6, 7, 10, 11]
    assert select(group, np.zeros(12), 3) == [0, 4, 8], "equal scores: the lower index stays"
