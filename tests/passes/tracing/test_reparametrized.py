"""Weights that a model computes from others become plain ones: pruned, exported and trained like any."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import compressor
from compressor import PlanError
from compressor.passes.tracing.reparametrized import with_plain_weights
from compressor.runtime.measuring.measure import check_onnx
from compressor.runtime.onnx.precision import PARITY
from tests.networks import check_effective

X = torch.randn(2, 3, 8, 8)


def by_hook(norm):
    def wrapped(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return wrapped


WAYS = {
    "weight norm, hook": by_hook(nn.utils.weight_norm),
    "weight norm, parametrization": parametrizations.weight_norm,
    "spectral norm, hook": by_hook(nn.utils.spectral_norm),
    "spectral norm, parametrization": parametrizations.spectral_norm,
}


class Normed(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.a = way(nn.Conv2d(3, 12, 3, padding=1))
        self.b = way(nn.Conv2d(12, 8, 3, padding=1))
        self.c = nn.Linear(8, 5)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("way", WAYS)
def test_pruned_and_exported_like_plain_weights(way, tmp_path):
    model = Normed(WAYS[way]).eval()
    model(X)
    before = copy.deepcopy(model.state_dict())
    graph = compressor.trace(model, (X,))
    torch.testing.assert_close(graph(X), model(X))
    assert {"a.weight", "b.weight"} <= set(graph.state_dict())
    assert not [key for key in graph.state_dict() if "_g" in key or "original" in key]
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    check_effective(with_plain_weights(model), (X,), most=0.6)
    channels = compressor.analyze(graph)
    small = compressor.apply(channels.plan(0.5), graph)
    compressor.export(small, tmp_path / "small.onnx")
    assert check_onnx(tmp_path / "small.onnx", small) <= PARITY["fp32"]


def test_a_model_that_has_just_been_trained_is_traced():
    model = Normed(WAYS["weight norm, hook"])
    model(X).sum().backward()  # its weights now have a history, with which they cannot be copied
    graph = compressor.trace(model, (X,))
    assert graph.training
    torch.testing.assert_close(graph.eval()(X), model.eval()(X))


def test_narrowing_in_place_says_why_not():
    model = Normed(WAYS["weight norm, parametrization"]).eval()
    plan = compressor.analyze(compressor.trace(model, (X,))).plan(0.5)
    with pytest.raises(PlanError, match=r"computes `a\.weight` from other tensors"):
        compressor.apply(plan, model, (X,))
