"""Graphs that move between devices, and float32 that is float32."""

import pytest
import torch
from torch import nn

import compressor
from compressor.passes.tracing.modes import full_float32
from compressor.passes.tracing.trace import moved, on_cpu, quiet_deepcopy


class Zeros(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y, torch.zeros(y.shape[0], 2, 8, 8, device=y.device)], 1)


@pytest.fixture
def graph():
    return compressor.trace(Zeros().eval(), (torch.randn(1, 3, 8, 8),))


def test_a_graph_on_the_cpu_is_not_copied(graph):
    assert on_cpu(graph) is graph


def test_a_moved_graph_makes_its_constants_where_it_is(graph):
    there = moved(quiet_deepcopy(graph), torch.device("meta"))
    assert there(torch.empty(3, 3, 8, 8, device="meta")).device.type == "meta"
    assert {node.kwargs["device"].type for node in there.graph.nodes if "device" in node.kwargs} == {"meta"}
    assert {p.device.type for p in graph.parameters()} == {"cpu"}, "the copy moved, not the original"
    with torch.no_grad():
        assert graph(torch.randn(3, 3, 8, 8)).shape == (3, 6, 8, 8)


def test_full_float32_puts_back_what_was_allowed_also_after_an_error():
    def fails():
        with full_float32():
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
            raise ValueError("inside")

    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError, match="inside"):
        fails()
    assert torch.backends.cudnn.allow_tf32 == before
