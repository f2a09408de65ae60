"""Removing branches: removed = masked, what is left keeps its names and costs, repairs aim at what is stood for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor import Plan, PlanError, Structure
from compressor.methods.structures.legal_widths import widths
from compressor.passes.channels.search_space import SearchSpace
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.transforms.remove_branches import branches_named, rewiring
from compressor.runtime.latency_model.training_engines import plan_of
from compressor.runtime.measuring.measure import export_checked
from tests.networks import Net, cbr, check_plan, conv, end, head, randomize
from tests.passes.channels.test_branches import CASES, Block, sequence, stem
from tools.cifar_resnet import resnet20

X = (torch.randn(2, 3, 8, 8),)


def built(case="several"):
    torch.manual_seed(0)
    forward, layers, width, _ = CASES[case]
    return randomize(Net(forward, stem=conv(3, 6), fc=head(width), **layers))


class Written(nn.Module):
    """Activations that write to what they read, as torchvision's do, and one that is no use twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 6), conv(6, 6)
        self.fc = head(6)

    def forward(self, x):
        x = F.relu_(self.stem(x))
        y = self.a(x)
        y += x
        z = F.leaky_relu_(y, 0.5)
        z = z + self.b(z)
        z = F.silu(z, inplace=True)
        return end(self, x + self.c(z))


MODELS = {name: built for name, (*_, expected) in CASES.items() if expected}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_removed_is_masked(case, ratio):
    model = built(case)
    channels = compressor.analyze(compressor.trace(model, X))
    for branch in channels.branches:
        narrowed = channels.plan(ratio, seed=0)
        check_plan(model, X, channels, Plan.keep(dict(narrowed.kept), channels.digest, removed=[branch.name]))


@pytest.mark.parametrize("names", [["a"], ["b"], ["c"], ["a", "b"], ["a", "b", "c"]])
def test_what_writes_in_place_does_not_reach_the_shortcut(names):
    torch.manual_seed(0)
    model = randomize(Written())
    channels = compressor.analyze(compressor.trace(model, X))
    assert [branch.name for branch in channels.branches] == ["a", "b", "a-c"]
    if "c" in names:
        names = ["a-c"]
    check_plan(model, X, channels, Plan.keep({}, channels.digest, removed=names))


def test_parameters_of_a_branch_are_gone_and_the_others_keep_their_names():
    model = built()
    graph = compressor.trace(model, X)
    small = compressor.apply(Plan.keep({}, removed=["a"]), graph)
    before, after = graph.state_dict(), small.state_dict()
    assert set(before) - set(after) == {name for name in before if name.startswith("a.")}
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert not hasattr(small, "a")


def test_an_activation_is_not_applied_twice():
    graph = compressor.trace(built(), X)
    count = sum("relu" in str(node.target) for node in graph.graph.nodes)
    small = compressor.apply(Plan.keep({}, removed=["a", "b"]), graph)
    assert sum("relu" in str(node.target) for node in small.graph.nodes) == count - 4 == 1


def test_a_plan_with_branches_goes_through_json_and_old_ones_still_load():
    plan = Plan.keep({"stem": [0, 1]}, removed=["b", "a", "a"])
    assert plan.removed == ("a", "b")
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.digest != Plan.keep({"stem": [0, 1]}).digest
    structure = Structure((("stem", 2),), removed=("a",))
    assert Structure.from_json(structure.to_json()) == structure
    assert structure.digest != Structure((("stem", 2),)).digest
    old = plan.to_json().replace('"schema": 2', '"schema": 1')
    assert Plan.from_json(old) == plan
    with pytest.raises(PlanError, match="must be a list of names"):
        Plan.from_json(plan.to_json().replace('"b"', "3"))


def test_branches_that_cannot_go_are_named():
    channels = compressor.analyze(compressor.trace(built("both sides of an addition"), X))
    with pytest.raises(PlanError, match="`nothing`, which is not there"):
        compressor.apply(Plan.keep({}, removed=["nothing"]), channels.graph)
    with pytest.raises(PlanError, match=r"both `a\.conv1-conv2` and `a\.project`"):
        compressor.apply(Plan.keep({}, removed=["a.conv1-conv2", "a.project"]), channels.graph)


def test_the_one_inside_goes_with_the_other():
    channels = compressor.analyze(compressor.trace(built("one in another"), X))
    assert [branch.name for branch in branches_named(channels.branches, {"c", "a.0-b.1"})] == ["a.0-b.1"]


def test_what_is_left_stands_for_the_last_sum():
    """relu(stem) has the part of relu(b's sum): what goes into it is to be that sum."""
    channels = compressor.analyze(compressor.trace(built(), X))
    wired = rewiring(channels.graph.graph, branches_named(channels.branches, {"a", "b"}))
    assert wired.means == {"relu": "relu_4", "stem": "add_1"}
    assert wired.instead == {"add": "relu", "relu_2": "relu", "add_1": "relu", "relu_4": "relu"}


def test_a_chain_of_removals_is_followed():
    """relu(stem) + a, without an activation, then + b, with one: both are gone, and one activation with them."""

    def forward(m, x):
        s = stem(m, x)
        y = s + m.a(s)
        z = F.relu(y + m.b(y))
        return end(m, F.relu(z + m.c(z)))

    torch.manual_seed(0)
    model = randomize(Net(forward, stem=conv(3, 6), a=conv(6, 6), b=conv(6, 6), c=conv(6, 6), fc=head(6)))
    channels = compressor.analyze(compressor.trace(model, X))
    wired = rewiring(channels.graph.graph, branches_named(channels.branches, {"a", "b"}))
    assert wired.means == {"relu": "relu_1", "stem": "add_1"}
    plan = Plan.keep({}, channels.digest, removed=["a", "b"])
    small = check_plan(model, X, channels, plan)
    Compensate(channels, plan, Calibration.read([torch.randn(16, 3, 8, 8)], channels.graph, 16)).run(small)


@pytest.mark.parametrize("removed", ["a.conv1-conv2", "a.project"])
def test_one_side_of_an_addition_takes_the_whole_sum_over(removed):
    model = built("both sides of an addition")
    channels = compressor.analyze(compressor.trace(model, X))
    plan = Plan.keep({}, channels.digest, removed=[removed])
    small = compressor.apply(plan, channels.graph).eval()
    images = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    fixed = Compensate(channels, plan, Calibration.read(images, channels.graph, 128)).run(small)
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        before, after = (float((graph(x) - model(x)).norm()) for graph in (small, fixed.graph))
    assert after < 0.8 * before


def test_weights_that_something_else_uses_stay():
    def outside(m, x):
        s = stem(m, x)
        return end(m, m.a(s) * (s + F.conv2d(s, m.a.weight, padding=1)))

    def twice(m, x):
        s = stem(m, x)
        return end(m, s + F.conv2d(m.a(s), m.a.weight, padding=1))

    for forward, stays in ((outside, True), (twice, False)):
        torch.manual_seed(0)
        model = randomize(Net(forward, stem=conv(3, 6), a=conv(6, 6), fc=head(6)))
        channels = compressor.analyze(compressor.trace(model, X))
        for branch in channels.branches:
            small = check_plan(model, X, channels, Plan.keep({}, channels.digest, removed=[branch.name]))
            assert hasattr(small, "a") is stays


def test_a_layer_that_is_gone_cannot_change():
    channels = compressor.analyze(compressor.trace(built(), X))
    plan = Plan.keep({}, reads={"a.conv1": [0, 1]}, removed=["a"])
    with pytest.raises(PlanError, match=r"changes layer `a\.conv1`, which is in a branch that it removes"):
        channels.structure(plan)


def test_who_is_read_as_it_was_keeps_its_target():
    def forward(m, x):
        s = stem(m, x)
        return end(m, torch.cat([s + m.a(s), s], 1))

    channels = compressor.analyze(compressor.trace(randomize(Net(forward, stem=conv(3, 6), a=cbr(6, 6), fc=head(12))), X))
    assert rewiring(channels.graph.graph, channels.branches).means == {}


def test_a_branch_that_the_layer_in_front_can_do_is_made_up_for_exactly():
    """X + a(x) with everything linear: the stem takes the branch over, whatever it was."""
    torch.manual_seed(0)

    def forward(m, x):
        s = m.stem(x)
        return end(m, s + m.a(s))

    model = randomize(Net(forward, stem=nn.Conv2d(3, 6, 1), a=nn.Conv2d(6, 6, 1), fc=head(6)))
    channels = compressor.analyze(compressor.trace(model, X))
    plan = Plan.keep({}, channels.digest, removed=["a"])
    images = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    small = compressor.apply(plan, channels.graph).eval()
    fixed = Compensate(channels, plan, Calibration.read(images, channels.graph, 64), Compensation(ridge=0.0)).run(small)
    with torch.no_grad():
        torch.testing.assert_close(fixed.graph(*X), model(*X), rtol=1e-4, atol=1e-5)
    assert {repair.layer for repair in fixed.repairs} == {"stem", "fc"}


def test_a_gate_that_is_constant_is_made_up_for_exactly_by_who_reads_the_channels():
    torch.manual_seed(0)
    model = randomize(Net(CASES["a gate for channels"][0], stem=conv(3, 6), fc=head(6), g=nn.Conv2d(6, 6, 1)))
    with torch.no_grad():
        model.g.weight.zero_()
        model.g.bias.copy_(torch.randn(6))
    channels = compressor.analyze(compressor.trace(model, X))
    plan = Plan.keep({}, channels.digest, removed=["g"])
    images = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    small = compressor.apply(plan, channels.graph).eval()
    assert not any(name.startswith("g.") for name in small.state_dict())
    fixed = Compensate(channels, plan, Calibration.read(images, channels.graph, 64), Compensation(ridge=0.0)).run(small)
    with torch.no_grad():
        torch.testing.assert_close(fixed.graph(*X), model(*X), rtol=1e-4, atol=1e-5)


def test_compensation_brings_a_deeper_network_nearer():
    torch.manual_seed(0)
    blocks = {name: Block(12, 12) for name in "abcd"}
    model = randomize(Net(sequence(*blocks), stem=conv(3, 12), fc=head(12), **blocks))
    channels = compressor.analyze(compressor.trace(model, X))
    plan = Plan.keep({}, channels.digest, removed=["b", "c"])
    images = [torch.randn(32, 3, 8, 8) for _ in range(8)]
    small = compressor.apply(plan, channels.graph).eval()
    fixed = Compensate(channels, plan, Calibration.read(images, channels.graph, 256)).run(small).graph
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        before, after = (float((graph(x) - model(x)).norm() / model(x).norm()) for graph in (small, fixed))
    assert after < 0.5 * before


def test_export_agrees(tmp_path):
    channels = compressor.analyze(compressor.trace(built(), X))
    narrowed = channels.plan(0.3, seed=0)
    small = compressor.apply(Plan.keep(dict(narrowed.kept), channels.digest, removed=["a"]), channels.graph).eval()
    assert export_checked(small, tmp_path / "model.onnx") < 1e-4


def test_costs_of_branches_in_a_row_are_those_of_the_network():
    model = built()
    channels = compressor.analyze(compressor.trace(model, X))
    space = SearchSpace.of(channels, ranks=True, depth=True)
    random = np.random.default_rng(0)
    rows = np.stack([random.choice(widths(group, 1), 12) for group in space.groups], axis=1)
    costs = space.costs(rows)
    for k, row in enumerate(rows):
        structure = space.structure_of(row)
        graph = compressor.apply(plan_of(space, structure), channels.graph)
        assert costs.params[k] == sum(p.numel() for p in graph.parameters())
        assert costs.memory_bytes[k] == sum(t.numel() * t.element_size() for t in [*graph.parameters(), *graph.buffers()])
        again = compressor.analyze(graph)
        assert costs.macs[k] == again.costs_of(again.full).macs[0] == space.costs_of(structure).macs[0]
        assert space.costs.macs(row[None])[0] == costs.macs[k]


@pytest.mark.parametrize(
    "removed", [["layer1.0"], ["layer1.1", "layer2.0", "layer3.2"], [f"layer{i}.{k}" for i in (1, 2, 3) for k in range(3)]]
)
def test_blocks_of_the_users_own_module_are_replaced_by_what_is_left_of_them(removed):
    torch.manual_seed(0)
    model, example = resnet20().eval(), (torch.zeros(1, 3, 32, 32),)
    graph = compressor.trace(model, example)
    channels = compressor.analyze(graph)
    kept = {"layer1.1.conv1": range(0, 16, 2)} if "layer1.1" not in removed else {}
    kept = {group.name: list(kept[layer]) for group in channels.free for layer in kept if layer in group.layers}
    plan = Plan.keep(kept, channels.digest, removed=removed)
    expected, kind = compressor.apply(plan, graph), type(model.layer1[1])
    found = compressor.apply(plan, model, example)
    assert found is model
    x = torch.randn(3, 3, 32, 32)
    assert torch.allclose(found(x), expected(x), atol=1e-5)
    assert set(found.state_dict()) == set(expected.state_dict())
    assert sum(isinstance(module, kind) for module in model.modules()) == 9 - len(removed)


def test_what_is_added_in_the_models_own_forward_is_refused_in_place_with_the_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.fc((x + self.branch(x)).mean((2, 3)))

    model, example = Net().eval(), (torch.zeros(1, 3, 8, 8),)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match="`branch` cannot be removed in place: it is added in the `forward` of the model itself"):
        compressor.apply(
            Plan.keep({}, compressor.analyze(compressor.trace(model, example)).digest, removed=["branch"]), model, example
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
