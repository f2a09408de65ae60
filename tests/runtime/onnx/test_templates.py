"""`Lowering`: what is written from the template computes what the exported network does."""

import numpy as np
import pytest
import torch
from torch import nn

import compressor
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.runtime.measuring.measure import check_onnx
from compressor.runtime.onnx.templates import Lowering
from tests.networks import randomize


class Depthwise(nn.Module):
    """Depthwise convolution, squeeze and excitation, a padded shortcut and a flatten: numbers of every kind."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.deep, self.narrow = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 24, 1)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.fc = nn.Linear(24 * 16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = self.deep(torch.relu(self.wide(x)))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.narrow(y) + nn.functional.pad(x, (0, 0, 0, 0, 4, 4))
        return self.fc(nn.functional.adaptive_avg_pool2d(y, 4).flatten(1))


@pytest.fixture(scope="module")
def channels():
    torch.manual_seed(0)
    return compressor.analyze(compressor.trace(randomize(Depthwise()).eval(), (torch.randn(1, 3, 8, 8),)))


def narrowed(channels, seed):
    random = np.random.default_rng(seed)
    structure = channels.nearest({group.name: group.size * random.uniform(0.3, 0.95) for group in channels.free})
    kept = {name: range(width) for name, width in structure.widths if name in {g.name for g in channels.free}}
    return RemoveChannels(compressor.Plan.keep(kept, channels.digest), channels)(channels.graph).graph


def test_two_exports_teach_it_to_write_the_others(channels):
    lower = Lowering()
    example = (torch.randn(2, 3, 8, 8),)
    for seed in range(6):
        graph = narrowed(channels, seed)
        model = lower(graph, example)
        assert check_onnx(model.SerializeToString(), graph) < 1e-5
    assert lower.exports == 2
    assert lower.written == 4


def test_another_network_is_exported(channels):
    lower = Lowering()
    for seed in range(2):
        lower(narrowed(channels, seed), (torch.randn(2, 3, 8, 8),))
    other = compressor.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), (torch.randn(1, 3, 8, 8),))
    assert check_onnx(lower(other, (torch.randn(2, 3, 8, 8),)).SerializeToString(), other) < 1e-5
    assert lower.exports == 3


def test_asked_for_anew_it_exports(channels):
    lower = Lowering()
    for seed in range(3):
        lower(narrowed(channels, seed), (torch.randn(2, 3, 8, 8),), fresh=True)
    assert lower.exports == 3


def test_depthwise_groups_follow_their_weights_where_the_first_networks_were_equally_wide(channels):
    lower = Lowering()
    free = {group.name: group for group in channels.free}
    wide = next(name for name, group in free.items() if "deep" in group.layers or name == "wide")

    def network(width, others):
        kept = {name: range(width if name == wide else max(group.size - others, 1)) for name, group in free.items()}
        return RemoveChannels(compressor.Plan.keep(kept, channels.digest), channels)(channels.graph).graph

    for width, others in ((16, 1), (16, 3), (8, 2)):
        graph = network(width, others)
        assert check_onnx(lower(graph, (torch.randn(2, 3, 8, 8),)).SerializeToString(), graph) < 1e-5
    assert lower.written == 1


def test_slopes_of_a_prelu_are_its_weights_also_where_the_first_networks_had_the_same():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 24, 3), nn.PReLU(24), nn.Conv2d(24, 5, 3)]
    net = nn.Sequential(*layers)
    for layer in (net[1], net[3]):
        layer.weight.data.normal_()
    channels = compressor.analyze(compressor.trace(net.eval(), (torch.randn(1, 3, 16, 16),)))
    lower, example = Lowering(), (torch.randn(2, 3, 16, 16),)
    for first, second in ((16, 20), (16, 24), (10, 24), (8, 9)):
        kept = {"0": range(first), "2": range(second)}
        graph = RemoveChannels(compressor.Plan.keep(kept, channels.digest), channels)(channels.graph).graph
        assert check_onnx(lower(graph, example).SerializeToString(), graph) < 1e-5
    assert (lower.exports, lower.written) == (2, 2)
