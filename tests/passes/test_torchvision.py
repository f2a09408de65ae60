"""removed = masked, export and ONNX Runtime on torchvision's classifiers, with random weights."""

import pytest
import torch

import compressor
from compressor.runtime.latency import PARITY, check_onnx
from tests.networks import check, randomize

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

NAMES = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_small", "densenet121",
    "googlenet", "squeezenet1_1", "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5", "vgg11_bn", "alexnet", "convnext_tiny",
)  # fmt: skip


def build(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    return randomize(getattr(models, name)(weights=None, **options))


@pytest.mark.parametrize("name", NAMES)
def test_removed_equals_masked_and_exports(name, tmp_path):
    model = build(name)
    inputs = (torch.randn(2, 3, 224, 224),)
    with torch.no_grad():
        scale = float(model(inputs[0]).std())
    assert scale > 0, "a network that is constant would pass any oracle"
    for ratio, seed in ((0.3, 1), (0.5, 0), (0.9, None)):
        _, _, small = check(model, inputs, ratio, seed)
    compressor.export(small, tmp_path / "small.onnx")
    assert check_onnx(tmp_path / "small.onnx", small) <= PARITY


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0"])
def test_trace_gives_the_model_with_its_keys_at_any_batch_size(name):
    model = build(name)
    graph = compressor.trace(model, (torch.randn(1, 3, 224, 224),))
    assert set(graph.state_dict()) == set(model.state_dict())
    for batch in (1, 3):
        x = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            assert torch.equal(graph(x), model(x))
    graph.train()
    graph(torch.randn(2, 3, 224, 224)).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
