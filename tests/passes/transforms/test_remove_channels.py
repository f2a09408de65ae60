"""RemoveChannels: attributes, constants, and what must not change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.channels.analyze import analyze
from compressor.passes.transforms.base import Sequential
from compressor.passes.transforms.remove_channels import RemoveChannels
from tests.networks import Residual, randomize

X = (torch.randn(2, 3, 8, 8),)


def test_modified_is_said_truthfully():
    graph = compressor.trace(Residual(), X)
    channels = analyze(graph)
    assert RemoveChannels(channels.plan(0.5))(graph).modified
    unchanged = RemoveChannels(channels.plan(0.0))(graph)
    assert not unchanged.modified
    assert torch.equal(unchanged.graph.eval()(*X), graph.eval()(*X))


def test_attributes_of_modules_say_what_their_tensors_are():
    graph = compressor.trace(Residual(), X)
    small = compressor.apply(compressor.Plan.keep({"conv1": range(5), "stem": range(6)}), graph)
    conv, norm, linear = (small.get_submodule(name) for name in ("conv1", "bn1", "fc"))
    assert (conv.in_channels, conv.out_channels) == (6, 5)
    assert norm.num_features == 5
    assert (linear.in_features, linear.out_features) == (6, 5)
    assert repr(conv).startswith("Conv2d(6, 5")


def test_the_new_graph_shares_nothing_and_takes_over_requires_grad():
    graph = compressor.trace(Residual(), X)
    graph.get_parameter("stem.weight").requires_grad = False
    before = copy.deepcopy(graph.state_dict())
    small = compressor.apply(analyze(graph).plan(0.5), graph)
    assert not small.get_parameter("stem.weight").requires_grad
    assert small.get_parameter("conv1.weight").requires_grad
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())


def test_recorded_shapes_follow():
    graph = compressor.trace(Residual(), X)
    small = compressor.apply(compressor.Plan.keep({"conv1": range(5)}), graph)
    shapes = {node.name: node.meta["compressor.value"][1:] for node in small.graph.nodes if node.op == "call_module"}
    assert shapes["conv1"] == (5, 8, 8)
    assert shapes["conv2"] == (8, 8, 8)


def test_zero_padding_shrinks_with_what_it_meets():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            a = self.a(x)
            return self.c(F.pad(a, (0, 0, 0, 0, 2, 2)) + self.b(a))

    graph = compressor.trace(Padded(), X)
    channels = analyze(graph)
    assert {group.name: group.size for group in channels.free} == {"a": 4, "b": 4}
    small = compressor.apply(compressor.Plan.keep({"b": [1, 2, 3]}), graph)
    (pad,) = [node for node in small.graph.nodes if "pad" in str(node.target)]
    assert pad.args[1] == [0, 0, 0, 0, 1, 2]


def test_uneven_parts_of_a_chunk_become_a_split_by_sizes():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            first, second = self.a(x).chunk(2, 1)
            return self.b(first) + self.c(second)

    graph = compressor.trace(Chunked(), X)
    assert [group.name for group in analyze(graph).free] == ["a", "a#2"]
    small = compressor.apply(compressor.Plan.keep({"a": [0], "a#2": [1, 2, 3]}), graph)
    (split,) = [node for node in small.graph.nodes if "split" in str(node.target)]
    assert split.args[1] == [1, 3]
    assert small(*X).shape == (2, 2, 8, 8)


def test_passes_compose_to_a_pass():
    graph = compressor.trace(Residual(), X)
    first = analyze(graph).plan(0.25)
    once = RemoveChannels(first)(graph).graph
    second = analyze(once).plan(0.5)
    both = Sequential([RemoveChannels(first), RemoveChannels(second)])(graph)
    assert both.modified
    assert torch.equal(both.graph.eval()(*X), RemoveChannels(second)(once).graph.eval()(*X))


def test_an_analysis_of_another_graph_is_refused():
    graph, other = compressor.trace(Residual(), X), compressor.trace(Residual(), X)
    channels = analyze(other)
    with pytest.raises(compressor.PassError, match="another graph"):
        RemoveChannels(channels.plan(0.5), channels)(graph)


def test_a_plan_narrows_the_original_module_in_place_with_the_same_numbers():
    model = randomize(Residual())
    graph = compressor.trace(model, X)
    plan = analyze(graph).plan(0.5, seed=0)
    expected = compressor.apply(plan, graph)(*X)
    assert compressor.apply(plan, model, X) is model
    assert model.conv1.out_channels == 6
    torch.testing.assert_close(model(*X), expected, rtol=1e-6, atol=1e-6)  # the same ops on the same numbers


class Scaled(nn.Module):
    """Reads an attribute that removal changes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.b(self.a(x) / self.a.out_channels**0.5)


class Plain(Scaled):
    """Holds a tensor that is no parameter and no buffer."""

    def __init__(self):
        super().__init__()
        self.table = torch.randn(8, 1, 1)

    def forward(self, x):
        return self.b(self.a(x) + self.table)


@pytest.mark.parametrize("kind", [Scaled, Plain])
def test_a_forward_that_depends_on_a_size_is_refused_and_the_model_is_untouched(kind):
    model = kind()
    plan = analyze(compressor.trace(model, X)).plan(0.5)
    with pytest.raises(compressor.PlanError, match="cannot be narrowed in place"):
        compressor.apply(plan, model, X)
    assert model.a.out_channels == 8
    assert compressor.apply(plan, compressor.trace(model, X))(*X).shape == (2, 2, 8, 8)


def test_tied_weights_stay_tied_in_place():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
            self.stem = nn.Conv2d(3, 8, 1)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(self.stem(x))))))

    model = Tied()
    graph = compressor.trace(model, X)
    plan = analyze(graph).plan(0.5)
    expected = compressor.apply(plan, graph)(*X)
    compressor.apply(plan, model, X)
    assert model.a.weight is model.b.weight
    torch.testing.assert_close(model(*X), expected, rtol=1e-6, atol=1e-6)  # the same ops on the same numbers


def test_a_module_whose_forward_holds_sizes_is_left_alone_in_place():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x):
            return self.fc(self.a(x).view(-1, 4 * 36))

    model = Viewed()
    plan = analyze(compressor.trace(model, X)).plan(0.5)
    with pytest.raises(compressor.PlanError, match=r"holds sizes that would need editing.*view"):
        compressor.apply(plan, model, X)
    assert model.a.out_channels == 4
