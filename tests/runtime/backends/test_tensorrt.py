"""TensorRT through its worker: the real parser and builder of TensorRT-RTX need no GPU; what goes wrong is said."""

import sys

import onnx
import pytest
import torch

import compressor
from compressor.passes.layers.factorizable import sizes_of
from compressor.passes.layers.forms import FORMS
from compressor.runtime.backends import BACKENDS, Workload
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine
from compressor.runtime.backends.tensorrt import TensorRT, TensorRTRTX
from compressor.runtime.backends.tensorrt_engine import check_types, engine_types
from compressor.runtime.backends.worker_process import WorkerProcess
from compressor.runtime.measuring.measure import check_parity, example_for
from tests.networks import Residual, factorized, randomize

pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return compressor.trace(randomize(Residual()).eval(), (torch.randn(1, 3, 8, 8),))


def workload(graph, target):
    return Workload(example_for(graph, target), graph)


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "float32"), ("fp16", "float16"), ("int8", "int8")])
def test_every_precision_parses_and_builds_with_a_dynamic_batch(graph, tmp_path, precision, kind):
    target = compressor.Target("tensorrt-rtx", batch=4, precision=precision, options={"max_batch": 8})
    seen = []
    file = tmp_path / "engine"
    found = TensorRTRTX().compile(workload(graph, target), target, file, progress=lambda *event: seen.append(event))
    assert file.stat().st_size == found["engine_bytes"] > 1000
    assert found["network_types"] == {kind: 4}  # three convolutions and the classifier
    assert len(seen) > 3, "the builder reports its progress"
    assert {len(event) for event in seen} == {3}


@pytest.mark.parametrize("form", FORMS)
def test_sequences_of_every_form_parse_and_build(graph, tmp_path, form):
    target = compressor.Target("tensorrt-rtx", batch=4, options={"max_batch": 8})
    small = factorized(graph, form)
    found = TensorRTRTX().compile(workload(small, target), target, tmp_path / "engine")
    stages = len(FORMS[form].stages(sizes_of(graph.get_submodule("conv1")), (1, 1, 1)))
    assert found["network_types"] == {"float32": 3 + stages}, "each stage is a convolution of the engine"


def test_a_strongly_typed_build_of_another_precision_is_refused():
    with pytest.raises(compressor.BackendError, match=r"was to be fp16, but its convolutions .* are 5 in float32"):
        check_types({"float32": 5}, "fp16")
    check_types({"float16": 4, "float32": 1}, "fp16")
    layers = [
        {
            "Name": "conv1",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
        },
        {"Name": "conv2", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]},
        {"Name": "pool", "LayerType": "PoolingV2", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]},
    ]
    assert engine_types(layers) == {"float16": 1, "float32": 1}


def test_without_a_gpu_building_works_and_running_says_why_not(graph):
    target = compressor.Target("tensorrt-rtx")
    health = TensorRTRTX().check()
    if health.works:
        pytest.skip("there is a GPU")
    assert "can be built here, but not run" in health.detail
    with pytest.raises(compressor.BackendError, match="no CUDA device"):
        TensorRTRTX().build(workload(graph, target), target)


def test_a_model_that_the_parser_refuses_is_said(tmp_path):
    worker = TensorRTRTX().worker()
    try:
        (tmp_path / "model.onnx").write_bytes(b"no model")
        with pytest.raises(compressor.BackendError, match="parser refuses the model"):
            worker.ask("build", 60, onnx=str(tmp_path / "model.onnx"), engine=str(tmp_path / "engine"), profile=None)
        assert worker.ask("hello", 60)["package"] == "tensorrt_rtx", "the worker lives on"
    finally:
        worker.close()


def test_a_missing_package_names_what_to_install(monkeypatch):
    health = TensorRT().check()
    if not health.works:
        assert "tensorrt" in health.remedy
    monkeypatch.setenv("COMPRESSOR_TENSORRT_PYTHON", "/nowhere/python")
    with pytest.raises(compressor.BackendError, match="cannot start /nowhere/python"):
        TensorRT().worker()


CRASHES = {
    "import os, sys; sys.stdin.readline(); os.abort()": "was killed by SIGABRT during `build`",
    "import sys; sys.stdin.readline(); print('no memory', file=sys.stderr); sys.exit(9)": "exit code 9 during `build`: no memory",
    "import time; time.sleep(60)": "did not answer `build` within 1 s and was stopped",
}


@pytest.mark.parametrize("program", CRASHES)
def test_a_worker_that_crashes_or_hangs_is_an_error_and_nothing_worse(program):
    worker = WorkerProcess([sys.executable, "-c", program], "tensorrt")
    with pytest.raises(compressor.BackendError, match=CRASHES[program]):
        worker.ask("build", 1 if "sleep" in program else 20)
    with pytest.raises(compressor.BackendError):  # it is gone, and says so again
        worker.ask("hello", 1)
    worker.close()


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_options_of_the_builder_are_part_of_the_fingerprint(name):
    target = compressor.Target(name, options={"optimization_level": 5})
    assert target.options["optimization_level"] == 5
    assert set(BACKENDS[name]().options) >= {"version_compatible", "hardware_compatible", "strip_weights", "tf32"}


def test_old_releases_get_an_older_opset_that_is_valid_and_computes_the_same(graph):
    """TensorRT 8 parses opset 17, and wants INT8 weights in float with a Q/DQ pair."""
    target = compressor.Target("tensorrt", batch=2)
    for precision in ("fp32", "int8"):
        own = compressor.Target("tensorrt", batch=2, precision=precision)
        model = TensorRT()._model(workload(graph, target), own, weak=True)
        assert model.opset_import[0].version == 17
        onnx.checker.check_model(model)
        example = example_for(graph, target)
        with OnnxRuntimeEngine(model.SerializeToString(), example, compressor.Target(batch=2)) as engine:
            check_parity(engine, graph, example, 0.3)
        stored = {item.name: item.data_type for item in model.graph.initializer}
        quantized = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in stored]
        assert bool(quantized) == (precision == "int8")
