"""analyze: groups, plans and slices."""

import gc

import pytest
import torch
from torch import nn

import compressor
from compressor import Plan, PlanError
from compressor.passes.channels.analyze import analysis_of
from tests.networks import Residual, randomize

X = (torch.randn(2, 3, 8, 8),)


@pytest.fixture
def channels():
    return compressor.analyze(compressor.trace(randomize(Residual()), X))


def test_groups_say_who_makes_and_who_reads_them(channels):
    stream, inner, output = channels.groups
    assert (stream.name, stream.size, stream.frozen) == ("stem", 8, None)
    assert stream.layers == ("stem", "conv2")
    assert stream.readers == ("conv1", "fc")
    assert (inner.name, inner.size, inner.layers, inner.readers) == ("conv1", 12, ("conv1",), ("conv2",))
    assert output.name == "fc"
    assert "model output" in output.frozen


def test_slices_name_every_narrowed_tensor(channels):
    plan = Plan.keep({"conv1": [i for i in range(12) if i not in (2, 5)]})
    found = {(name, axis): removed for name, axis, removed in channels.slices(plan)}
    norms = {(f"bn1.{leaf}", 0): (2, 5) for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert found == {("conv1.weight", 0): (2, 5), ("conv2.weight", 1): (2, 5), **norms}


def test_plans_remove_the_share_and_random_ones_depend_on_the_seed_alone(channels):
    assert {name: len(kept) for name, kept in channels.plan(0.25).kept} == {"conv1": 9, "stem": 6}
    assert channels.plan(0.5, seed=1) == channels.plan(0.5, seed=1)
    assert channels.plan(0.5, seed=1) != channels.plan(0.5, seed=2)
    assert all(len(kept) == 1 for _, kept in channels.plan(1.0).kept)
    assert channels.slices(channels.plan(0.0)) == []
    with pytest.raises(PlanError, match="between 0 and 1"):
        channels.plan(1.5)


def test_without_a_seed_the_smallest_norms_go():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
    channels = compressor.analyze(compressor.trace(model, X))
    assert dict(channels.plan(0.5).kept) == {"0": (0, 2)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan.keep({"nowhere": [0]}), "names group `nowhere`.*compressor inspect"),
        (Plan.keep({"conv1": [12]}), "has 12 channels, the plan keeps index 12"),
        (Plan.keep({"fc": [0]}), "is frozen: model output"),
        (Plan.keep({"conv1": [0]}, model="f" * 64), "another architecture"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_reason(channels, plan, message):
    with pytest.raises(PlanError, match=message):
        channels.kept_masks(plan)


def test_equal_blocks_of_a_grouped_convolution_are_kept_or_the_rule_is_named():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    graph = compressor.trace(model, X)
    channels = compressor.analyze(graph)
    assert [group.granularity for group in channels.groups] == [3, 3, 1]
    small = compressor.apply(Plan.keep({"0": [0, 1, 6, 7, 10, 11]}), graph)
    assert small.get_submodule("2").in_channels == 6
    with pytest.raises(PlanError, match=r"1 to 3 channels in the blocks of Conv2d.*equally many.*`0`"):
        compressor.apply(Plan.keep({"0": [0, 1, 4, 5, 6, 8]}), graph)


def test_wanted_widths_become_the_nearest_legal_ones(channels):
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 4, 1))
    grouped = compressor.analyze(compressor.trace(model, X))
    wanted = {"0": 13.9, "2": 0}
    assert dict(grouped.nearest(wanted).widths) == {"0": 12, "2": 4, "4": 4}
    assert dict(grouped.nearest({"0": 14.0}).widths)["0"] == 16, "a tie goes to the wider one"
    assert dict(grouped.nearest({"0": 99}).widths)["0"] == 24
    assert channels.nearest({"fc": 1}) == channels.full, "what is frozen keeps its size"
    with pytest.raises(PlanError, match="no group `nowhere`"):
        channels.nearest({"nowhere": 1})


def test_the_digest_depends_on_the_architecture_and_not_on_weights(channels):
    assert compressor.analyze(compressor.trace(Residual(), X)).digest == channels.digest
    assert compressor.analyze(compressor.trace(Residual(inner=13), X)).digest != channels.digest


def test_costs_of_many_structures_are_those_of_the_built_networks(channels):
    plans = [channels.plan(ratio, seed=3) for ratio in (0.1, 0.4, 0.8)]
    costs = channels.costs(channels.widths([channels.structure(plan) for plan in plans]))
    for k, plan in enumerate(plans):
        small = compressor.apply(plan, channels.graph)
        tensors = [*small.parameters(), *small.buffers()]
        assert costs.params[k] == sum(p.numel() for p in small.parameters())
        assert costs.memory_bytes[k] == sum(t.numel() * t.element_size() for t in tensors)
        width, inner = small.get_submodule("stem").out_channels, small.get_submodule("conv1").out_channels
        by_hand = 64 * 9 * (3 * width + 2 * width * inner) + width * 5
        assert costs.macs[k] == by_hand


def test_a_graph_that_was_not_traced_is_refused():
    with pytest.raises(compressor.PassError, match="trace the model first"):
        compressor.analyze(torch.fx.symbolic_trace(Residual()))


def test_the_analysis_at_hand_is_used_while_the_graph_is_as_it_was():
    graph = compressor.trace(Residual(), (torch.zeros(1, 3, 8, 8),))
    channels = compressor.analyze(graph, lossy=False)
    assert analysis_of(graph) is channels
    (relu,) = [node for node in graph.graph.nodes if "relu" in node.name][:1]
    relu.replace_all_uses_with(relu.args[0])
    graph.graph.erase_node(relu)
    graph.recompile()
    changed = analysis_of(graph)
    assert changed is not channels
    assert changed.digest != channels.digest
    del changed
    gc.collect()
    assert analysis_of(graph) is not channels, "what nobody holds is gone, and nothing old comes back"
