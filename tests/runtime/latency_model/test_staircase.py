"""Staircases on a synthetic clock: the planted edges are found, exactly, under noise."""

import pytest
import torch
from torch import nn

import compressor
from compressor.methods.structures.legal_widths import widths
from compressor.runtime.latency_model.staircase import measure_staircase


class Chain(nn.Module):
    def __init__(self, channels=48, groups=1):
        super().__init__()
        self.first = nn.Conv2d(16, channels, 3, padding=1)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if groups > 1 else nn.Identity()
        self.last = nn.Conv2d(channels, 32, 3, padding=1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.last(self.deep(self.first(x).relu()).relu()).mean((2, 3)))


def analysis(model):
    return compressor.analyze(compressor.trace(model.eval(), (torch.randn(1, 16, 8, 8),)))


@pytest.mark.parametrize(("step", "seed"), [(8, 0), (8, 1), (12, 2), (6, 3)])
def test_planted_edges_are_found_exactly_under_noise(step, seed):
    channels = analysis(Chain())
    target = compressor.Target("fake", options={"noise": 0.02, "step": step, "seed": seed})
    found = measure_staircase(channels, channels.groups[0], target)
    assert found.layers == ("first", "last")
    assert found.edges == tuple(range(step, 49, step))
    assert len(found.widths) < 48, "not every width is measured"


def test_only_legal_widths_are_measured_and_the_last_on_each_step_is_its_edge():
    channels = analysis(Chain())
    target = compressor.Target("fake", options={"noise": 0.02, "step": 12})
    legal = widths(channels.groups[0], align=4)
    found = measure_staircase(channels, channels.groups[0], target, legal=legal)
    assert set(found.widths) <= set(legal)
    assert found.edges == (12, 24, 36, 48)


def test_depthwise_layers_belong_to_the_piece():
    channels = analysis(Chain(groups=2))
    found = measure_staircase(channels, channels.groups[0], compressor.Target("fake", options={"step": 16, "noise": 0.01}))
    assert found.layers == ("first", "deep", "last")
    assert found.edges == (16, 32, 48)


def test_a_search_space_made_from_it_holds_every_width_worth_having():
    channels = analysis(Chain())
    group = channels.groups[0]
    target = compressor.Target("fake", options={"noise": 0.02, "step": 8})
    edges = measure_staircase(channels, group, target).edges
    assert widths(group, align=1, edges=edges) == edges
    step = lambda width: -(-width // 8)  # noqa: E731
    for width in range(1, 49):  # whatever is left out is no faster than a wider one that is in
        assert any(edge >= width and step(edge) == step(width) for edge in edges)


def test_of_the_legal_multiples_those_stay_that_no_wider_one_on_their_step_beats():
    group = analysis(Chain()).groups[0]
    assert widths(group, align=8) == (8, 16, 24, 32, 40, 48)
    assert widths(group, align=8, edges=[5, 12, 16, 32, 48]) == (8, 16, 32, 48)
    assert widths(group, align=8, edges=[1, 2, 48]) == (48,), "narrower than the target's vectors is not legal"


def test_a_group_that_no_convolution_reads_is_refused():
    channels = analysis(Chain())
    frozen = next(group for group in channels.groups if group.name == "last")
    with pytest.raises(compressor.BackendError, match="no plain convolution makes it and another one reads it"):
        measure_staircase(channels, frozen, compressor.Target("fake"))
