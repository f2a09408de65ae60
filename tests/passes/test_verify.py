"""The oracle must fail on a wrong answer."""

import pytest
import torch

import compressor
from compressor.passes.verify import relative_error, verify_removal
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


def test_relative_error_is_infinite_for_other_shapes_and_nan():
    one = torch.ones(2, 3)
    assert relative_error([one], [one]) == 0
    assert relative_error([one * 1.1], [one]) == pytest.approx(0.1, rel=1e-5)  # float32 holds 1.1 to 1e-7
    assert relative_error([one], [torch.ones(3, 2)]) == float("inf")
    assert relative_error([one * float("nan")], [one]) == float("inf")
    assert relative_error([one, one], [one]) == float("inf")
