"""Merging layers: merged = linearised, and a reason where that cannot be."""

import pytest
import torch
from torch import nn

import compressor
from compressor import PlanError
from compressor.cli.inspection import inspection, inspection_table
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.fold_batchnorm import FoldBatchNorm
from compressor.passes.transforms.merge_layers import MergeLayers, merges_of
from compressor.runtime.measuring.measure import export_checked
from tests.networks import randomize

X = (torch.randn(2, 3, 9, 9),)


def network(*layers, example=X):
    torch.manual_seed(0)
    model = randomize(nn.Sequential(*layers).eval())
    return compressor.trace(model, example)


def linearised(graph):
    """The graph with its activations left out."""
    found = quiet_deepcopy(FoldBatchNorm()(graph).graph).eval()
    for merge in merges_of(graph):
        for name in merge.activations:
            node = next(node for node in found.graph.nodes if node.name == name)
            node.replace_all_uses_with(node.all_input_nodes[0])
            found.graph.erase_node(node)
    found.recompile()
    return found


EXACT = {
    "3x3 then 1x1": [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)],
    "1x1 with a stride behind": [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 5, 1, 2, bias=False)],
    "1x1 without a bias, then 3x3": [nn.Conv2d(3, 8, 1, bias=False), nn.ReLU6(), nn.Conv2d(8, 5, 3, 2, 1)],
    "1x1 with a bias, then 3x3 without padding": [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 3)],
    "3x3 then 3x3 without padding": [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3)],
    "uneven kernels": [nn.Conv2d(3, 8, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(8, 5, (3, 2), (2, 1))],
    "depthwise then 1x1": [nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Hardswish(), nn.Conv2d(6, 5, 1)],
    "grouped, both": [
        nn.Conv2d(3, 6, 1, bias=False),
        nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, groups=2),
    ],
    "three in a row": [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv2d(12, 5, 1)],
}


@pytest.mark.parametrize("case", EXACT)
def test_merged_is_linearised(case, tmp_path):
    graph = network(*EXACT[case])
    merges = merges_of(graph)
    assert merges
    assert not any(merge.reason for merge in merges)
    found = MergeLayers([merge.second for merge in merges])(graph)
    assert found.modified
    x = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(found.graph(x), linearised(graph)(x), rtol=1e-4, atol=1e-5)
    layers = [module for module in found.graph.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 1
    again = compressor.analyze(compressor.trace(found.graph, X))
    assert again.costs_of(again.full).macs[0] == merges[-1].macs[1] or len(merges) > 1
    export_checked(found.graph, tmp_path / "merged.onnx")


def test_linear_layers_become_one():
    graph = network(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6), example=(torch.randn(2, 4, 6),))
    (merge,) = merges_of(graph)
    assert merge.macs == (2 * 4 * 6 * 24, 4 * 6 * 6)
    found = MergeLayers([merge.second])(graph).graph
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(found(x), linearised(graph)(x), rtol=1e-4, atol=1e-5)


def test_one_of_several_goes_and_the_others_keep_names_and_outputs():
    graph = network(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    found = MergeLayers(["2"])(graph).graph
    assert set(found.state_dict()) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    assert found.get_submodule("2").kernel_size == (3, 3)
    torch.testing.assert_close(found.state_dict()["4.weight"], graph.state_dict()["4.weight"])


REFUSED = {
    "a bias in front of padding": ([nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)], "the first would give its bias"),
    "padding twice": ([nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)], "would have gone on computing"),
    "a stride in front": ([nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 5, 3)], "the first has a stride"),
    "dilation": ([nn.Conv2d(3, 8, 3, dilation=2), nn.ReLU(), nn.Conv2d(8, 5, 1)], "dilation is not plain"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(case):
    layers, reason = REFUSED[case]
    graph = network(*layers)
    (merge,) = merges_of(graph)
    assert reason in merge.reason
    with pytest.raises(PlanError, match=reason):
        MergeLayers([merge.second])(graph)


def test_a_layer_that_something_else_reads_is_not_merged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(torch.relu(y))

    graph = compressor.trace(Net().eval(), X)
    assert merges_of(graph) == ()
    with pytest.raises(PlanError, match="has no layer in front"):
        MergeLayers(["b"])(graph)
    assert not MergeLayers([])(graph).modified


def test_inspection_says_what_could_become_one_layer():
    channels = compressor.analyze(network(*EXACT["3x3 then 1x1"], nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)))
    (one, other) = inspection(channels)["merges"]
    assert (one["first"], one["second"], one["reason"]) == ("0", "3", "")
    assert one["macs"][1] < one["macs"][0]
    assert other["reason"]
    assert "2 pairs of layers have only an activation between them; without it 1 could become one" in inspection_table(channels)
