"""The TensorRT back end from ONNX to timed engine where the real library cannot start: its worker, over a CUDA for tests."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.runtime.backends import Workload
from compressor.runtime.backends.tensorrt import TensorRT, _greeting
from compressor.runtime.backends.tensorrt_engine import engine_types
from compressor.runtime.measuring.measure import check_parity, example_for, measure
from compressor.runtime.onnx.precision import PARITY
from compressor.runtime.timing.protocol import Protocol
from tests.networks import Residual, randomize
from tests.runtime.fake_cuda import environment

QUICK = Protocol(warm_up_s=0.01, settle_s=0.1, max_samples=30, max_s=2.0)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture
def version(libraries, monkeypatch):
    """Makes it the TensorRT of this process, of a version and with a fault."""

    def be(said):
        for name, value in environment(libraries, sys.executable, said).items():
            monkeypatch.setenv(name, value)
        _greeting.cache_clear()

    yield be
    _greeting.cache_clear()


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return compressor.trace(randomize(Residual()).eval(), (torch.randn(1, 3, 8, 8),))


@pytest.mark.parametrize("said", ["8.6.1", "10.12.0"])
@pytest.mark.parametrize(("precision", "kind"), [("fp32", "float32"), ("fp16", "float16"), ("int8", "int8")])
def test_an_engine_is_built_compared_timed_and_taken_apart(graph, version, said, precision, kind):
    version(said)
    target = compressor.Target("tensorrt", batch=4, precision=precision)
    assert TensorRT().check().works
    example = example_for(graph, target)
    with TensorRT().build(Workload(example, graph, calibration=[example]), target) as engine:
        assert check_parity(engine, graph, example, PARITY[precision]) <= PARITY[precision]
        assert engine_types(engine.information)[kind] >= 3
        timer = engine.timer()
        assert timer(5).wall_s >= 5 * 0.2e-3  # replays of the graph: 0.2 ms each there
        engine.run([x.numpy() for x in example])  # binds anew: the graph is gone, and captured again
        assert timer(2).wall_s >= 2 * 0.2e-3
        modules = {module for layer in engine.layers(3) for module in layer.modules}
        assert "conv1" in modules
        assert timer(1).wall_s >= 0.2e-3


def test_an_engine_that_ignored_the_precision_is_refused(graph, version):
    version("8.6.1,ignores-flags")
    target = compressor.Target("tensorrt", batch=4, precision="fp16")
    with pytest.raises(compressor.BackendError, match=r"was to be fp16, but its convolutions .* in float32"):
        TensorRT().build(Workload(example_for(graph, target), graph), target)


def test_a_batch_outside_of_the_profile_and_a_cut_off_engine_are_said(graph, version, tmp_path):
    version("8.6.1")
    target = compressor.Target("tensorrt", batch=4)
    file = tmp_path / "engine"
    TensorRT().compile(Workload(example_for(graph, target), graph), target, file)
    with TensorRT().load(file, target) as engine, pytest.raises(compressor.BackendError, match="the engine was built for"):
        engine.run([torch.randn(5, 3, 8, 8).numpy()])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(compressor.BackendError, match="the engine cannot be loaded: the engine is of another version or cut off"):
        TensorRT().load(file, target)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + F.pad(x, (0, 0, 0, 0, 1, 2))  # a shortcut with zero channels


def test_paddings_reach_an_old_opset(version):
    version("8.6.1")
    torch.manual_seed(0)
    padded, target = compressor.trace(Padded().eval(), (torch.randn(1, 3, 8, 8),)), compressor.Target("tensorrt", batch=4)
    example = example_for(padded, target)
    with TensorRT().build(Workload(example, padded), target) as engine:
        assert check_parity(engine, padded, example) < 1e-4


def test_networks_are_measured_together_through_it(graph, version):
    version("10.12.0")
    found = measure({"a": graph}, compressor.Target("tensorrt", batch=2, precision="fp16"), protocol=QUICK)["a"]
    assert 0.2 <= found.median_ms < 20
    assert found.target["device"] == "CUDA for tests"
