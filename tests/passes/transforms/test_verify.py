"""The oracle must fail on a wrong answer."""

import copy

import pytest
import torch

import compressor
from compressor.passes.labels.rules import RULES
from compressor.passes.transforms.verify import relative_error, verify_removal
from tests.networks import Residual, randomize

X = (torch.randn(2, 3, 8, 8),)


@pytest.fixture
def removed():
    graph = compressor.trace(randomize(Residual()), X)
    channels = compressor.analyze(graph)
    plan = channels.plan(0.5, seed=0)
    return channels, plan, compressor.apply(plan, graph)


def test_a_right_removal_passes(removed):
    channels, plan, graph = removed
    assert verify_removal(channels, plan, graph, X).relative_error < 1e-5


def test_two_swapped_channels_are_caught(removed):
    channels, plan, graph = removed
    with torch.no_grad():
        weight = graph.get_parameter("conv2.weight")
        weight[:, [0, 1]] = weight[:, [1, 0]]
    with pytest.raises(compressor.PassError, match="changed the outputs by a relative"):
        verify_removal(channels, plan, graph, X)


def test_another_plan_than_the_applied_one_is_caught(removed):
    channels, _, graph = removed
    with pytest.raises(compressor.PassError):
        verify_removal(channels, channels.plan(0.5, seed=1), graph, X)


SHUFFLED = torch.nn.Sequential(
    torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ChannelShuffle(3), torch.nn.Conv2d(12, 6, 3, padding=1), torch.nn.ReLU(),
    torch.nn.Conv2d(6, 4, 1),
)  # fmt: skip


@pytest.mark.parametrize("swapped", [(), (0, 3), (2, 7), (11, 5)])
def test_a_rule_that_swaps_two_labels_of_a_shuffle_is_caught(monkeypatch, swapped):
    key = torch.ops.aten.channel_shuffle
    right = RULES[key]

    def wrong(call, labeler):
        value = right(call, labeler)
        labels = value.axes[1]
        labels[list(swapped)] = labels[list(reversed(swapped))]
        return value

    monkeypatch.setitem(RULES, key, wrong)
    graph = compressor.trace(randomize(copy.deepcopy(SHUFFLED)), X)
    channels = compressor.analyze(graph)
    (first, *_) = channels.free
    caught = asked = 0
    for unit in range(first.size):  # each of the swapped labels is in some plan
        plan = compressor.Plan.keep({first.name: [k for k in range(first.size) if k != unit]})
        small = compressor.apply(plan, graph)
        try:
            verify_removal(channels, plan, small, X)
        except compressor.PassError:
            caught += 1
        try:
            compressor.apply(plan, graph, verify=True)
        except compressor.PassError:
            asked += 1
    assert caught == asked == (2 if swapped else 0), "both plans that remove a swapped label must fail"


def test_relative_error_is_infinite_for_other_shapes_and_nan():
    one = torch.ones(2, 3)
    assert relative_error([one], [one]) == 0
    assert relative_error([one * 1.1], [one]) == pytest.approx(0.1, rel=1e-5)  # float32 holds 1.1 to 1e-7
    assert relative_error([one], [torch.ones(3, 2)]) == float("inf")
    assert relative_error([one * float("nan")], [one]) == float("inf")
    assert relative_error([one, one], [one]) == float("inf")
