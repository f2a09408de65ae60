"""`FactorizeConv`: the sequence is the layer, its costs are those of what is built, and its ranks are channels like others."""

import pytest
import torch
from torch import nn

import compressor
from compressor.errors import PassError, PlanError
from compressor.passes.layers.factorizable import factorizable, sizes_of
from compressor.passes.layers.forms import FORMS
from compressor.passes.transforms.apply_plan import applied
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.passes.transforms.verify import verify_removal
from compressor.values.plan import Factorization, Plan, Structure

LAYERS = {
    "plain": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 9)),
    "strided, dilated": (nn.Conv2d(6, 8, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (6, 15, 17)),
    "reflecting": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 9, 9)),
    "same": (nn.Conv2d(6, 8, 3, padding="same"), (6, 9, 9)),
    "grouped, no bias": (nn.Conv2d(6, 8, 3, groups=2, bias=False), (6, 9, 9)),
    "pointwise": (nn.Conv2d(6, 8, 1, stride=2), (6, 9, 9)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=(1, 0)), (6, 9, 9)),
    "transposed, grouped": (nn.ConvTranspose2d(6, 8, (3, 2), stride=(2, 1), groups=2, dilation=(2, 1)), (6, 9, 9)),
    "1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2), (6, 19)),
    "3d": (nn.Conv3d(4, 6, (3, 2, 3), padding=(1, 0, 1)), (4, 6, 7, 6)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)), (4, 6, 7, 6)),
    "linear": (nn.Linear(12, 7), (12,)),
    "linear over a sequence": (nn.Linear(12, 7), (5, 12)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 9, 9)),
}
CASES = [(layer, form) for layer in LAYERS for form in FORMS if FORMS[form].refuses(sizes_of(LAYERS[layer][0])) is None]


def graph_of(*modules, shape, batch=2):
    net = nn.Sequential(*modules).eval()
    return compressor.trace(net, (torch.randn(batch, *shape),))


def difference(one, other, shape):
    x = torch.randn(3, *shape)
    with torch.no_grad():
        expected = one(x)
        return float((other(x) - expected).norm() / expected.norm())


def factors(graph, layer, form, share=1.0):
    full = FORMS[form].full(sizes_of(graph.get_submodule(layer)))
    return Factorization(layer, form, tuple(max(1, round(share * rank)) for rank in full))


@pytest.mark.parametrize(("layer", "form"), CASES)
def test_at_full_rank_the_sequence_is_the_layer(layer, form):
    module, shape = LAYERS[layer]
    graph = graph_of(module, nn.ReLU(), shape=shape)
    result = FactorizeConv([factors(graph, "0", form)])(graph)
    assert result.modified
    assert difference(graph, result.graph, shape) < 2e-6  # float32, as many roundings as stages
    assert {name.partition(".")[0] for name in result.graph.state_dict()} == {"0"}


@pytest.mark.parametrize(("layer", "form"), CASES)
def test_costs_are_those_of_the_network_that_is_built(layer, form):
    module, shape = LAYERS[layer]
    graph = graph_of(module, nn.ReLU(), shape=shape)
    channels = compressor.analyze(graph)
    plan = Plan.keep({}, channels.digest, factors=[factors(graph, "0", form, 0.5)])
    built = applied(plan, channels)
    own = compressor.analyze(built)
    found, expected = channels.costs_of(channels.structure(plan)), own.costs_of(own.full)
    assert (found.macs[0], found.params[0]) == (expected.macs[0], expected.params[0])
    assert found.memory_bytes[0] == expected.memory_bytes[0]
    assert found.macs[0] != channels.costs_of(channels.full).macs[0]


def residual():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.a, self.norm = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(12)
            self.b, self.down = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(8, 16, 1, stride=2)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))) + self.down(x))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return compressor.trace(Net().eval(), (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("form", FORMS)
def test_costs_with_channels_removed_and_layers_factorized(form):
    graph = residual()
    channels = compressor.analyze(graph)
    removed = channels.plan(0.4)
    narrowed = applied(removed, channels)
    plan = Plan.keep(dict(removed.kept), channels.digest, factors=[factors(narrowed, layer, form, 0.6) for layer in ("a", "b")])
    built = compressor.analyze(applied(plan, channels))
    found, expected = channels.costs_of(channels.structure(plan)), built.costs_of(built.full)
    assert (found.macs[0], found.params[0]) == (expected.macs[0], expected.params[0])


@pytest.mark.parametrize("form", ["svd", "spatial_svd", "tucker2", "tensor_train", "cp"])
def test_ranks_are_channels_like_others(form):
    graph = residual()
    built = FactorizeConv([factors(graph, "b", form, 0.7)])(graph).graph
    channels = compressor.analyze(built)
    inner = [group for group in channels.free if group.name.startswith("b.")]
    assert inner, "the ranks are free groups of the new graph"
    group = inner[0]
    plan = Plan.keep({group.name: range(group.size - 2)}, channels.digest)
    removed = applied(plan, channels)
    assert verify_removal(channels, plan, removed).relative_error < 1e-5
    assert sum(p.numel() for p in removed.parameters()) < sum(p.numel() for p in built.parameters())


def test_removing_the_last_ranks_of_an_svd_is_the_svd_of_smaller_rank():
    graph = residual()
    full, small = (FactorizeConv([Factorization("b", "svd", (rank,))])(graph).graph for rank in (16, 5))
    channels = compressor.analyze(full)
    (group,) = [group for group in channels.free if group.name == "b.0"]
    removed = applied(Plan.keep({group.name: range(5)}, channels.digest), channels)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(removed(x), small(x), atol=1e-5, rtol=1e-5)


def test_the_graph_that_goes_in_is_left_alone_and_trains_when_it_comes_out():
    graph = residual()
    x = torch.randn(4, 3, 8, 8)
    before = graph(x)
    built = FactorizeConv([factors(graph, "a", "tucker2", 0.5)])(graph).graph.train()
    built(x).square().sum().backward()
    assert all(p.grad is not None for p in built.parameters())
    torch.testing.assert_close(graph(x), before)
    assert not FactorizeConv([])(graph).modified


def test_a_plan_with_factorizations_is_the_same_network_after_a_round_trip(tmp_path):
    graph = residual()
    channels = compressor.analyze(graph)
    factored = [Factorization("a", "svd", (4,)), Factorization("b", "svd", (6,))]
    plan = Plan.keep(dict(channels.plan(0.3).kept), channels.digest, factors=factored)
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.digest == plan.digest != Plan.keep(dict(plan.kept), channels.digest).digest
    structure = channels.structure(plan)
    assert Structure.from_json(structure.to_json()) == structure
    assert Factorization.of_axes(structure.ranks) == plan.factors
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compressor.apply(again, graph)(x), compressor.apply(plan, graph)(x), rtol=0, atol=0)


def test_an_analysis_of_another_graph_is_refused():
    graph, other = residual(), residual()
    with pytest.raises(PassError, match="made of another graph"):
        RemoveChannels(Plan.keep({}), compressor.analyze(other))(graph)


def test_exported_it_gives_the_same_outputs(tmp_path):
    graph = residual()
    built = FactorizeConv([factors(graph, "a", "spatial_svd", 0.5), factors(graph, "b", "cp", 0.3)])(graph).graph
    assert compressor.export(built, tmp_path / "net.onnx").exists()  # compares with ONNX Runtime, raises where they differ


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Factorization("c", "svd", (2,)), "`c` is called 0 times"),
        (Factorization("norm", "svd", (2,)), "no convolution and no linear layer"),
        (Factorization("b", "qr", (2,)), "no form `qr`; there are svd, spatial_svd"),
        (Factorization("down", "cp", (2,)), "single pixel: use svd"),
        (Factorization("b", "svd", (17,)), r"between 1 and \[16\], found \[17\]"),
        (Factorization("b", "tucker2", (2,)), "tucker2 has 2 ranks, found 1"),
    ],
)
def test_what_cannot_be_factorized_is_refused_with_the_reason(one, message):
    graph = residual()
    with pytest.raises(PlanError, match=message):
        FactorizeConv([one])(graph)


def test_shared_weights_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.one(torch.relu(self.one(x)))

    graph = compressor.trace(Twice().eval(), (torch.randn(2, 4, 6, 6),))
    reasons = factorizable(graph, FORMS["svd"])
    assert all(reason and "called 2 times" in reason for reason in reasons.values())


def test_hostile_factors_in_a_plan_are_refused():
    text = '{"schema": 1, "model": "", "keep": {}, "factors": %s}'
    for own, message in (
        ("[]", "`factors` must be an object"),
        ('{"a": 3}', "must hold a form and a list of ranks"),
        ('{"a": {"form": "svd", "ranks": [0]}}', "positive integers"),
        ('{"a": {"form": "svd", "ranks": ["x"]}}', "positive integers"),
        ('{"a": {"form": "svd", "ranks": []}}', "positive integers"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.from_json(text % own)
    with pytest.raises(PlanError, match="factorized twice"):
        Plan.keep({}, factors=[Factorization("a", "svd", (1,)), Factorization("a", "cp", (1,))])
    with pytest.raises(PlanError, match="no rank"):
        Factorization.of_axes([("conv", 3)])


def test_a_module_is_not_factorized_in_place():
    plan = Plan.keep({}, factors=[Factorization("0", "svd", (2,))])
    with pytest.raises(PlanError, match="makes a new graph"):
        compressor.apply(plan, nn.Sequential(nn.Conv2d(3, 4, 3)), (torch.zeros(1, 3, 8, 8),))
