"""Networks that compensation could get wrong: in-place ops, shared weights and norms, few samples, odd batches."""

import pytest
import torch
from torch import nn

import compressor
from compressor.errors import PassError
from compressor.passes.channels.readers import beyond_repair, readers_of
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.trace import outputs_of
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.values.plan import Factorization, Plan
from tests.networks import Residual, randomize
from tests.networks import first_output as outputs
from tests.networks import output_error as error

SETTINGS = Compensation(positions=10**6)


def prepared(model, *shape):
    graph = compressor.trace(randomize(model), (torch.zeros(*shape),)).eval()
    return graph, compressor.analyze(graph)


def repaired(graph, channels, plan, x, settings=SETTINGS):
    small = compressor.apply(plan, graph).eval()
    return small, Compensate(channels, plan, Calibration(((x,),)), settings).run(small)


class InPlace(nn.Module):
    """A shortcut by `+=`, and a forward that changes its input."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = x.clone().sub_(0.5)
        x = torch.relu(self.stem(x))
        y = self.outer(torch.relu_(self.inner(x)))
        y += x
        return self.fc(y.mean((2, 3)))


def test_in_place_ops_change_neither_images_nor_what_a_fork_needs_and_the_shortcut_is_seen():
    graph, channels = prepared(InPlace(), 1, 3, 8, 8)
    assert any(node.target._schema.is_mutable for node in graph.graph.nodes if hasattr(node.target, "_schema"))
    assert readers_of(channels)["outer"].shortcut is not None
    x = torch.randn(16, 3, 8, 8)
    before, expected = x.clone(), outputs(graph, x)
    prefix = Prefix(graph, Calibration(((x,),)), Shelf(1 << 30))
    for node in list(graph.graph.nodes)[1:-1]:
        prefix.before(node.name)
        for _ in range(2):
            assert torch.equal(outputs_of(next(prefix.fork().finish()))[0].double(), expected), node.name
    assert torch.equal(x, before)


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.a, self.b = nn.Conv2d(10, 6, 3, padding=1, bias=False), nn.Conv2d(10, 6, 1, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.norm(self.a(x))), torch.relu(self.norm(self.b(x)))], 1)
        return self.fc(x.mean((2, 3)))


def test_a_norm_behind_two_layers_is_not_given_the_bias_of_one():
    graph, channels = prepared(SharedNorm(), 1, 3, 8, 8)
    assert {reader.norm for reader in readers_of(channels).values()} == {None}
    x = torch.randn(32, 3, 8, 8)
    plan = compressor.Plan.keep({"stem": [0, 1, 2, 3, 6]})
    small, found = repaired(graph, channels, plan, x, Compensation(positions=10**6))
    assert error(graph, found.graph, x) < error(graph, small, x)
    assert torch.equal(found.graph.get_submodule("norm").running_mean, small.get_submodule("norm").running_mean)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.stem(x))))).mean((2, 3))


def test_a_weight_of_two_layers_is_left_alone_and_named():
    _, channels = prepared(Tied(), 1, 3, 8, 8)
    assert not {"a", "b"} & {reader.layer for reader in readers_of(channels).values()}
    assert {"a", "b"} & set(beyond_repair(channels))


class Tokens(nn.Module):
    """Linear layers over (N, T, C) with a norm over T behind, or over (T, N, C)."""

    def __init__(self, sequence_first):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 12), nn.Linear(12, 7), nn.BatchNorm1d(4)
        self.sequence_first = sequence_first

    def forward(self, x):
        if self.sequence_first:
            return self.second(torch.relu(self.first(x.transpose(0, 1)))).mean(0)
        return self.norm(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_linear_layers_over_tokens_are_fitted_on_every_token(sequence_first):
    graph, channels = prepared(Tokens(sequence_first), 1, 4, 6)
    x = torch.randn(64, 4, 6)
    plan = compressor.Plan.keep({"first": [0, 2, 3, 5, 8, 9]})
    small, found = repaired(graph, channels, plan, x, Compensation(positions=10**6))
    assert [(repair.layer, repair.samples) for repair in found.repairs] == [("second", 256)]
    assert error(graph, found.graph, x) < error(graph, small, x)


class Fixed(nn.Module):
    """Works for batches of 16 only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)
        self.register_buffer("scale", torch.ones(16, 1))

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * self.scale


def test_a_fixed_batch_is_used_whole():
    graph, channels = prepared(Fixed(), 16, 6)
    found = Calibration.read(torch.randn(64, 6).split(16), graph, 50)
    assert [len(batch[0]) for batch in found.batches] == [16] * 4
    assert [len(batch[0]) for batch in (*found.first(20).batches, *found.after(20).batches)] == [16] * 4
    plan = compressor.Plan.keep({"a": [0, 1, 2, 5]})
    small = compressor.apply(plan, graph).eval()
    assert Compensate(channels, plan, found, SETTINGS).run(small).repairs[0].after < 1


def test_few_samples_for_many_inputs_do_not_fit_noise():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 256, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(256, 20),
    )  # fmt: skip
    graph, channels = prepared(model, 1, 3, 8, 8)
    plan = compressor.Plan.keep({"2": range(224)})
    x, other = torch.randn(250, 3, 8, 8), torch.randn(500, 3, 8, 8)
    errors = {}
    for choose in (False, True):
        _, found = repaired(graph, channels, plan, x, Compensation(ridge=None if choose else 1e-6))
        errors[choose] = error(graph, found.graph, other)
    (repair,) = found.repairs
    assert errors[True] < 0.5 * errors[False]
    assert repair.after < repair.held_out < 1
    assert repair.ridge > 1e-6


def test_a_graph_that_the_plan_did_not_make_is_refused():
    graph, channels = prepared(Residual(8, 12), 1, 3, 8, 8)
    plan, other = channels.plan(0.5, seed=0), channels.plan(0.25, seed=0)
    wrong = compressor.apply(other, graph)
    with pytest.raises(PassError, match="not the original network narrowed by this plan"):
        Compensate(channels, plan, Calibration(((torch.randn(16, 3, 8, 8),),))).run(wrong)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_compensated_sequence_of_a_transposed_convolution_is_built_as_it_was_fitted(groups):
    """`cp` has no closed form: found again from the weight, its terms would be others."""
    layers = [nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(12, 12, 3, stride=2, groups=groups), nn.Flatten()]
    graph, channels = prepared(nn.Sequential(*layers), 1, 3, 9, 9)
    x = torch.randn(64, 3, 9, 9)
    plan = Plan.keep({}, channels.digest, factors=[Factorization("2", "cp", (9,))])
    fitted = Compensate(channels, plan, Calibration(((x,),)), SETTINGS).run(graph).graph
    built = FactorizeConv(plan.factors)(fitted).graph
    assert error(fitted, graph, x) > 0.01
    assert error(built, fitted, x) < 1e-6
