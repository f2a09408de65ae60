"""A traced torchvision network is that network: outputs, keys, batch sizes, training. Pruning: `tests/tools/test_zoo.py`."""

import pytest
import torch

import compressor
from tests.networks import randomize

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


def build(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    return randomize(getattr(models, name)(weights=None, **options))


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
