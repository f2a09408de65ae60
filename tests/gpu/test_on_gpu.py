"""The model on a GPU, data and examples on the CPU: everything gives what it gives on the CPU."""

import pytest
import torch
from torch import nn

import compressor
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.modes import full_float32
from compressor.passes.tracing.trace import DYNAMIC
from compressor.passes.transforms.narrow_module import narrow_module
from compressor.passes.transforms.verify import verify_removal
from compressor.runtime.measuring.measure import export_checked, measure
from tests.networks import Residual, randomize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(Residual()).eval()


def test_a_model_there_is_traced_with_a_dynamic_batch_and_stays_there(model):
    expected = compressor.trace(model, (torch.randn(1, 3, 8, 8),))
    found = compressor.trace(model.cuda(), (torch.randn(1, 3, 8, 8),))
    assert found.meta[DYNAMIC]
    assert {p.device.type for p in found.parameters()} == {"cuda"}
    x = torch.randn(5, 3, 8, 8)
    with full_float32(), torch.no_grad():
        torch.testing.assert_close(found(x.cuda()).cpu(), expected(x), rtol=1e-4, atol=1e-5)  # other kernels


def test_removed_equals_masked_and_the_export_equals_pytorch_there(model, tmp_path):
    graph = compressor.trace(model.cuda(), (torch.randn(1, 3, 8, 8),))
    channels = compressor.analyze(graph)
    plan = channels.plan(0.5)
    small = compressor.apply(plan, graph)
    assert verify_removal(channels, plan, small).relative_error < 1e-4
    assert export_checked(small, tmp_path / "small.onnx") < 1e-4


def test_compensation_there_gives_the_weights_of_the_cpu(model):
    graph = compressor.trace(model, (torch.randn(1, 3, 8, 8),))
    batches = tuple((torch.randn(16, 3, 8, 8),) for _ in range(4))
    found = {}
    for device in ("cpu", "cuda"):
        channels = compressor.analyze(compressor.trace(model.to(device), (torch.randn(1, 3, 8, 8),)))
        plan = channels.plan(0.5)
        small = compressor.apply(plan, channels.graph)
        found[device] = Compensate(channels, plan, Calibration(batches), Compensation(images=64)).run(small).graph.cpu()
    with torch.no_grad():
        x = torch.randn(8, 3, 8, 8)
        a, b = found["cuda"](x), found["cpu"](x)
    assert float((a - b).norm() / b.norm()) < 1e-3  # the same regression from features that differ by rounding
    assert graph is not found["cpu"]


def test_a_whole_compression_runs_there(model, tmp_path):
    batches = [(torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))) for _ in range(6)]
    target = compressor.Target("torch", batch=4, precision="fp16", options={"device": "cuda", "mode": "cudagraph"})
    result = compressor.compress(
        model.cuda(), (torch.zeros(1, 3, 8, 8),), train=batches, validate=batches[:2], budget=compressor.Budget(macs=0.5),
        target=target, method=compressor.CaP(), finetune=compressor.FineTune(epochs=1), out=tmp_path / "run",
    )  # fmt: skip
    assert result.met
    assert result.error < 1e-4
    assert result.compressed.median_ms > 0
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        loaded, program = compressor.load(tmp_path / "run", model.cpu())(x), compressor.load(tmp_path / "run")(x)
        torch.testing.assert_close(loaded, program, rtol=1e-4, atol=1e-5)


class NamesDevices(nn.Module):
    """Asks its input where and what it is, and makes tensors there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        y = y + torch.linspace(0, 1, y.shape[-1], device=x.device).to(y.device, torch.float32)
        return self.out(y[:, torch.arange(7, -1, -1, device=x.device)])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_that_names_devices_and_types_is_built_there(precision):
    model = NamesDevices().eval()
    channels = compressor.analyze(compressor.trace(model.cuda(), (torch.zeros(1, 3, 8, 8),)))
    small = compressor.apply(channels.plan(0.5), channels.graph)
    target = compressor.Target("torch", precision=precision, options={"device": "cuda", "mode": "cudagraph"})
    assert measure({"small": small}, target)["small"].median_ms > 0  # compares with PyTorch first


def test_narrowed_in_place_and_the_synthetic_clock_there(model):
    graph = compressor.trace(model.cuda(), (torch.randn(1, 3, 8, 8),))
    plan = compressor.analyze(graph).plan(0.5)
    small = compressor.apply(plan, graph)
    verify_removal(compressor.analyze(graph), plan, small, inputs=[torch.randn(2, 3, 8, 8)])
    narrowed = narrow_module(plan, model, graph)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with full_float32(), torch.no_grad():
        torch.testing.assert_close(narrowed(x), small(x), rtol=1e-4, atol=1e-5)
    assert measure({"small": small}, compressor.Target("fake"))["small"].median_ms > 0
