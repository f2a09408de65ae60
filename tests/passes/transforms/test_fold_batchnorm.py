"""`FoldBatchNorm`: the same function with fewer nodes; what cannot be folded is left alone."""

import pytest
import torch
from torch import nn

import compressor
from compressor.passes.transforms.fold_batchnorm import FoldBatchNorm, folded_state
from tests.networks import Residual, randomize

CASES = {
    "convolution without bias": (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
    "grouped, with bias": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), (2, 4, 9, 9)),
    "one dimension": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "three dimensions": (nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 5, 5, 5)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed and grouped": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "linear": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 4)),
    "norm without scale and shift": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), (2, 3, 9, 9)),
}


def norms_in(graph):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.modules())


@pytest.mark.parametrize("name", CASES)
def test_the_folded_layer_computes_the_same(name):
    model, shape = CASES[name]
    graph = compressor.trace(randomize(model).eval(), (torch.randn(shape),))
    result = FoldBatchNorm()(graph)
    assert result.modified
    assert norms_in(result.graph) == 0
    x = torch.randn(shape)
    torch.testing.assert_close(result.graph(x), graph(x), rtol=1e-4, atol=1e-5)  # one rounding of the weights more
    state = result.graph.state_dict()
    assert {k: v.shape for k, v in folded_state(graph).items()} == {k: v.shape for k, v in state.items()}
    for key, value in folded_state(graph).items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_a_residual_network_loses_every_norm_and_keeps_its_outputs():
    graph = compressor.trace(randomize(Residual()).eval(), (torch.randn(1, 3, 8, 8),))
    result = FoldBatchNorm()(graph).graph
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(result(x), graph(x), rtol=1e-4, atol=1e-5)
    assert norms_in(graph) > 0  # the argument is left alone


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(x))))


class NormOverTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ReadTwice(), (2, 3, 5, 5)),
        (UsedTwice(), (2, 4, 5, 5)),
        (NormOverTokens(), (2, 4, 6)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), (2, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (2, 3, 5, 5)),
    ],
)
def test_what_cannot_be_folded_is_left_alone(model, shape):
    graph = compressor.trace(randomize(model).eval(), (torch.randn(shape),))
    result = FoldBatchNorm()(graph)
    assert not result.modified
    assert result.graph is graph
