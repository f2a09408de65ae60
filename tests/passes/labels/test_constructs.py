"""Every construct of real networks is pruned effectively, removed = masked, and exported; inputs and outputs of any structure."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import compressor
from compressor.runtime.measuring.measure import check_onnx
from compressor.runtime.onnx.precision import PARITY
from tests.constructs import NETS
from tests.networks import Net, cbr, check_effective, conv, end, head, randomize

X2 = (2, 3, 8, 8)


@pytest.mark.parametrize("name", NETS)
def test_removed_equals_masked_and_exports(name, tmp_path):
    model = randomize(NETS[name]())
    channels = check_effective(model, (torch.randn(X2),))
    small = compressor.apply(channels.plan(0.5, seed=3), channels.graph)
    compressor.export(small, tmp_path / "small.onnx")
    assert check_onnx(tmp_path / "small.onnx", small) <= PARITY["fp32"]


@pytest.mark.parametrize("name", ["attention by hand", "attention, fused", "nn.MultiheadAttention", "einsum", "windowed attention"])
def test_attention_is_pruned_by_whole_heads(name):
    heads = {"windowed attention": 2}.get(name, 4)
    model = randomize(NETS[name]())
    channels = compressor.analyze(compressor.trace(model, (torch.randn(X2),)))
    assert heads in [group.size for group in channels.free], [(g.name, g.size, g.frozen) for g in channels.groups]


class Inputs(nn.Module):
    """Two inputs that meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 12), conv(1, 12), conv(12, 8)
        self.fc = head(8)

    def forward(self, image, depth):
        return end(self, self.out(F.relu(self.a(image) + self.b(depth))))


def test_several_inputs():
    check_effective(randomize(Inputs()), (torch.randn(X2), torch.randn(2, 1, 8, 8)))


@dataclass
class Prediction:
    """What a model may return."""

    boxes: torch.Tensor
    scores: torch.Tensor


pytree.register_dataclass(Prediction, serialized_type_name="tests.Prediction")


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass", "nested"])
def test_outputs_of_any_structure_keep_their_shapes(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.boxes, self.scores = cbr(3, 12), conv(12, 4, 1), conv(12, 5, 1)

        def forward(self, x):
            a = self.stem(x)
            boxes, scores = self.boxes(a), self.scores(a)
            return {
                "tuple": (boxes, scores),
                "list": [boxes, scores],
                "dict": {"boxes": boxes, "scores": scores},
                "dataclass": Prediction(boxes, scores),
                "nested": {"all": [(boxes, {"scores": scores})]},
            }[kind]

    model = randomize(Model())
    channels = check_effective(model, (torch.randn(X2),))
    small = compressor.apply(channels.plan(0.5), channels.graph)
    assert pytree.tree_structure(small(torch.randn(X2))) == pytree.tree_structure(model(torch.randn(X2)))


def test_an_inner_feature_that_is_returned_stays_and_the_rest_goes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = cbr(3, 12), cbr(12, 12), conv(12, 4)

        def forward(self, x):
            feature = self.a(x)
            return feature, self.c(self.b(feature))

    channels = check_effective(randomize(Model()), (torch.randn(X2),), most=0.9)
    assert [group.frozen is None for group in channels.groups] == [False, True, False]


def test_parameters_that_do_not_train_are_pruned_and_still_do_not_train():
    model = randomize(
        Net(lambda m, x: end(m, m.b(F.relu(m.n(m.a(x))))), a=conv(3, 12), n=nn.BatchNorm2d(12), b=conv(12, 8), fc=head(8))
    )
    model.a.requires_grad_(False)
    model.n.requires_grad_(False)
    channels = check_effective(model, (torch.randn(X2),))
    small = compressor.apply(channels.plan(0.5), channels.graph)
    trains = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_an_uneven_split_of_an_even_chunk_keeps_what_each_half_keeps():
    model = randomize(
        Net(
            lambda m, x: end(m, torch.cat([m.b(x1) if k else m.c(x1) for k, x1 in enumerate(m.a(x).chunk(2, 1))], 1)),
            a=conv(3, 12), b=conv(6, 4), c=conv(6, 4), fc=head(8),
        )
    )  # fmt: skip
    graph = compressor.trace(model, (torch.randn(X2),))
    channels = compressor.analyze(graph)
    first, second = channels.free[:2]
    plan = compressor.Plan.keep({first.name: [0, 5], second.name: [1, 2, 3, 4]})
    small = compressor.apply(plan, graph)
    (split,) = [node for node in small.graph.nodes if "split" in str(node.target)]
    assert split.args[1] == [2, 4]
