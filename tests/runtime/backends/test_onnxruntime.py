"""ONNX export and the ONNX Runtime engine."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.runtime.backends import Workload
from compressor.runtime.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from compressor.runtime.onnx.export import to_onnx
from tests.networks import Residual, randomize

X = (torch.randn(1, 3, 8, 8),)


@pytest.fixture
def graph():
    return compressor.trace(randomize(Residual()), X)


def test_the_batch_is_dynamic_and_names_are_kept(graph):
    model = to_onnx(graph, X)
    onnx.checker.check_model(model)
    (entry,) = model.graph.input
    assert entry.name == "x"
    sizes = [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 8, 8]
    names = {item.name for item in model.graph.initializer}
    assert {"stem.weight", "conv1.weight", "conv2.weight", "fc.weight", "fc.bias"} <= names


def test_a_closed_engine_and_wrong_inputs_are_said(graph):
    engine = OnnxRuntime().build(Workload(X, graph), compressor.Target())
    with pytest.raises(compressor.BackendError, match=r"takes 1 inputs \(x\), 2 were given"):
        engine.run([np.zeros((1, 3, 8, 8), np.float32)] * 2)
    with engine:
        pass
    with pytest.raises(compressor.BackendError, match="closed"):
        engine.run([np.zeros((1, 3, 8, 8), np.float32)])


def test_a_file_that_is_no_model_is_refused():
    with pytest.raises(compressor.BackendError, match="refuses the model"):
        OnnxRuntimeEngine(b"not onnx", X, compressor.Target())


def test_the_fingerprint_says_processor_version_and_threads():
    found = compressor.Target(threads=2, batch=4).fingerprint()
    assert found["threads"] == 2
    assert found["batch"] == 4
    assert found["device"]
    assert found["backend_version"]


def test_export_writes_a_checked_file(graph, tmp_path):
    path = compressor.export(graph, tmp_path / "deep" / "net.onnx")
    assert onnx.load(path).graph.input[0].name == "x"
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"], "no temporary file is left"


def test_an_export_that_differs_leaves_the_old_file(graph, tmp_path, monkeypatch):
    path = compressor.export(graph, tmp_path / "net.onnx")
    before = path.read_bytes()
    monkeypatch.setattr("compressor.runtime.measuring.measure.relative_error", lambda *_: 1.0)  # nothing passes
    with torch.no_grad():
        graph.get_parameter("fc.weight").mul_(2)
    with pytest.raises(compressor.BackendError, match="differ from PyTorch's"):
        compressor.export(graph, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_profile_measures_a_graph(graph):
    found = compressor.profile(graph)
    assert found.median_ms > 0
    assert found.target["backend"] == "onnxruntime"


def test_a_zero_padding_before_a_maximum_of_negative_values_stays_a_zero(tmp_path):
    """ONNX Runtime fuses it into the pool, where it would count as minus infinity."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.max_pool2d(F.pad(self.conv(x) - 100, (1, 1, 1, 1)), 3, 2)

    graph = compressor.trace(Padded(), (torch.randn(1, 3, 8, 8),))
    compressor.export(graph, tmp_path / "padded.onnx")  # raises if the outputs differ


def test_weights_computed_from_parameters_alone_are_constants_of_the_file():
    class Standardized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            weight = self.conv.weight
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.conv.bias)

    x = torch.randn(1, 3, 8, 8)
    model = to_onnx(compressor.trace(Standardized(), (x,)), (x,))
    assert [node.op_type for node in model.graph.node] == ["Conv"]
