"""The TensorRT back end from ONNX to timed engine where the real library cannot start: its worker, over a CUDA for tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compressor
from compressor.runtime import Workload
from compressor.runtime.latency import check_parity, example_for, measure
from compressor.runtime.precision import PARITY
from compressor.runtime.tensorrt import INTERPRETER, TensorRT, _greeting
from compressor.runtime.tensorrt_engine import engine_types
from compressor.runtime.timing import Protocol
from tests.networks import Residual, randomize

FAKE = Path(__file__).parent / "fake_tensorrt"
QUICK = Protocol(warm_up_s=0.01, settle_s=0.1, max_samples=30, max_s=2.0)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: the CUDA for tests cannot be built")
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("libcuda.so.1", "libcudart.so"):
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / name, FAKE / "cuda.c"], check=True)
    return folder


@pytest.fixture
def version(libraries, monkeypatch):
    """Makes it the TensorRT of this process, of a version and with a fault."""

    def be(said):
        monkeypatch.setenv("FAKE_TENSORRT", said)
        _greeting.cache_clear()

    monkeypatch.setenv("LD_LIBRARY_PATH", f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}")
    monkeypatch.setenv("COMPRESSOR_CUDART", str(libraries / "libcudart.so"))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv(INTERPRETER, sys.executable)
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


def test_networks_are_measured_together_through_it(graph, version):
    version("10.12.0")
    found = measure({"a": graph}, compressor.Target("tensorrt", batch=2, precision="fp16"), protocol=QUICK)["a"]
    assert 0.2 <= found.median_ms < 20
    assert found.target["device"] == "CUDA for tests"
