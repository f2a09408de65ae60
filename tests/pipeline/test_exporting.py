"""Exported engines: equal to PyTorch, described by their manifests, refused where they do not belong."""

import json

import numpy as np
import pytest
import torch

import compressor
from compressor.pipeline.exporting import export_engine, from_graph
from compressor.runtime.engines.manifest import Manifest, load_engine
from compressor.training.evaluate import evaluate
from tests.networks import QUICK, residual_graph
from tests.training.test_fine_tune import blobs


@pytest.fixture(scope="module")
def graph():
    return residual_graph()


@pytest.fixture(scope="module")
def data():
    x, y = blobs(64, 1).tensors
    return list(zip(x.split(16), y.split(16), strict=True))


@pytest.mark.parametrize("form", ["onnx", "onnx-fp16", "onnx-int8"])
def test_an_onnx_engine_comes_with_its_manifest_and_loads(graph, data, tmp_path, form):
    found = export_engine(from_graph(graph, "net"), form, tmp_path, data=data, protocol=QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.manifest.json"]
    manifest = Manifest.read(found.path)
    assert manifest == Manifest.read(found.path)
    assert manifest.form == form
    assert manifest.parity < {"onnx": 1e-4, "onnx-fp16": 1e-2, "onnx-int8": 0.2}[form]
    assert manifest.accuracy == pytest.approx(evaluate(graph, data).value, abs=5)  # INT8 may flip a few of 64
    assert manifest.latency["median"] == pytest.approx(found.measurement.median_ms)
    assert manifest.versions["onnxruntime"]
    assert "trtexec --onnx=" in found.commands[0]
    x = torch.randn(3, 3, 8, 8)
    with load_engine(found.path) as engine:
        (y,) = engine.run([x.numpy()])
    with torch.no_grad():
        expected = graph(x)
    assert (torch.from_numpy(np.array(y)) - expected).norm() / expected.norm() < 0.3


def test_a_changed_file_or_manifest_is_refused_with_the_way_to_rebuild(graph, tmp_path):
    found = export_engine(from_graph(graph, "net"), "onnx", tmp_path, protocol=QUICK)
    data = found.path.read_bytes()
    found.path.write_bytes(data[:-10])
    with pytest.raises(compressor.DataError, match=r"changed, or cut off\); rebuild it: compressor export net --format onnx"):
        load_engine(found.path)
    found.path.write_bytes(data)
    manifest = tmp_path / "net.onnx.manifest.json"
    text = manifest.read_text()
    without_seal = {name: value for name, value in json.loads(text).items() if name != "seal"}
    for wrong, message in (
        (text[:40], "cut off"),
        (text.replace('"schema_version": 1', '"schema_version": 9'), "was changed since it was written"),
        (json.dumps({**without_seal, "schema_version": 9}), "schema_version"),
    ):
        manifest.write_text(wrong)
        with pytest.raises(compressor.DataError, match=message):
            load_engine(found.path)
    plain = dict(without_seal)
    del plain["sha256"]
    manifest.write_text(json.dumps(plain))
    with pytest.raises(compressor.DataError, match="sha256"):
        load_engine(found.path)
    manifest.unlink()
    with pytest.raises(compressor.DataError, match="has no manifest"):
        load_engine(found.path)


def test_a_tensorrt_engine_of_another_version_or_device_is_refused(graph, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    target = compressor.Target("tensorrt-rtx", batch=2, precision="fp16", options={"max_batch": 4})
    found = export_engine(from_graph(graph, "net"), "tensorrt", tmp_path, target=target, protocol=QUICK)
    assert found.path.name == "net.plan"
    assert found.manifest.max_batch == 4
    manifest = tmp_path / "net.plan.manifest.json"
    text = manifest.read_text()
    other = json.loads(text)
    other["fingerprint"]["backend_version"] = "99.0"
    del other["seal"]
    manifest.write_text(json.dumps(other))
    with pytest.raises(
        compressor.BackendError, match=r"built with backend_version '99.0', here it is .* Rebuild it: compressor export"
    ):
        load_engine(found.path)


def test_an_engine_that_differs_is_not_exported(graph, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.pipeline.exporting.relative_error", lambda *_: 1.0)
    with pytest.raises(compressor.BackendError, match="it is not exported"):
        export_engine(from_graph(graph, "net"), "onnx-fp16", tmp_path, protocol=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_named_with_those_there_are(graph, tmp_path):
    with pytest.raises(compressor.DataError, match="no format 'tflite'; there are onnx, onnx-fp16"):
        export_engine(from_graph(graph, "net"), "tflite", tmp_path)
