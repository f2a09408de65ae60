"""Profiles: records of the schema, NVIDIA's two files, the page; from a model and from an ONNX file."""

import json
import subprocess

import numpy as np
import pytest
import torch

import compressor
from compressor.pipeline.profile_files import profile_records, write_profile
from compressor.pipeline.profiling import Network, onnx_inputs, profile_network
from compressor.report.profile_table import profile_table
from compressor.runtime.latency_model.staircase import measure_staircase
from compressor.runtime.onnx.read import load_onnx
from tests.networks import QUICK, residual_graph
from tests.training.test_fine_tune import blobs
from tools.cifar_resnet import resnet20


@pytest.fixture(scope="module")
def graph():
    return residual_graph()


@pytest.fixture(scope="module")
def file(graph, tmp_path_factory):
    return compressor.export(graph, tmp_path_factory.mktemp("onnx") / "net.onnx")


def targets(**options):
    return [compressor.Target(batch=b, precision=p, **options) for p in ("fp32", "int8") for b in (1, 4)]


@pytest.fixture(scope="module")
def found(graph):
    x, y = blobs(64, 1).tensors
    data = list(zip(x.split(16), y.split(16), strict=True))
    return profile_network(Network("net", graph=graph), targets(), data=data, layers=True, protocol=QUICK)


def test_a_profile_has_every_combination_compared_timed_and_looked_into(found, graph):
    assert [(p.target.precision, p.target.batch) for p in found] == [("fp32", 1), ("fp32", 4), ("int8", 1), ("int8", 4)]
    for p in found:
        assert p.measurement.median_ms > 0
        assert p.parity < 0.2
        assert p.throughput == pytest.approx(1000 * p.target.batch / p.measurement.median_ms)
        assert 0 <= p.accuracy <= 100
        assert p.inputs == {"x": (p.target.batch, 3, 8, 8)}
        assert p.measurement.target["precision"] == p.target.precision
    assert {m for layer in found[0].layers for m in layer.modules} >= {"stem", "conv1", "conv2", "fc"}
    assert len({p.measurement.session for p in found}) == 1, "one session for all"


def test_records_files_and_page(found, graph, tmp_path):
    channels = compressor.analyze(graph)
    stairs = [measure_staircase(channels, channels.free[0], compressor.Target("fake", options={"step": 4}))]
    records = profile_records(found, stairs, "net", "compressor profile net")
    write_profile(tmp_path, "a <net>", found, stairs, records)
    record = json.loads((tmp_path / "profile.json").read_text())["records"][0]
    assert record["schema_version"] == 1
    assert record["id"].startswith("sha256:")
    assert {"backend", "backend_version", "device", "precision", "inputs", "graph_hash", "protocol"} <= set(record["key"])
    result = record["result"]
    assert result["status"] in ("ok", "unstable", "contended")
    assert {"median", "ci95", "mean", "cv", "min", "p90", "p95", "p99", "n", "n_discarded"} <= set(result["host_latency_ms"])
    assert result["layer_sum_ms"] == pytest.approx(sum(layer["median_ms"] for layer in result["layers"]))
    assert "trtexec --onnx=" in record["reproduce"]["trtexec"]
    raw = np.load(tmp_path / "raw_samples.npz")
    assert len(raw["onnxruntime-fp32-b1"]) == len(found[0].measurement.raw_ms)
    times = json.loads((tmp_path / "profile_onnxruntime-fp32-b1.json").read_text())
    assert times[0] == {"count": 30}
    assert sum(entry["percentage"] for entry in times[1:]) == pytest.approx(100)
    layers = json.loads((tmp_path / "layers_onnxruntime-fp32-b1.json").read_text())["Layers"]
    assert [layer["Name"] for layer in layers] == [entry["name"] for entry in times[1:]]
    page = (tmp_path / "profile.html").read_text()
    assert "a &lt;net&gt;" in page
    assert page.count("<svg") == 1 + 4 + 1
    table = profile_table(found, stairs)
    assert "int8" in table
    assert "worth having are" in table


def test_an_onnx_file_is_compared_with_itself_in_fp32(file):
    found = profile_network(Network("net", model=load_onnx(file)), targets(), protocol=QUICK)
    assert all(p.measurement is not None for p in found)
    assert found[0].parity < 1e-6
    assert "random inputs" in found[2].notes[0]


def test_what_cannot_be_built_is_in_the_profile_with_its_reason(graph, file):
    one = compressor.Target("torch", precision="fp32")
    (found,) = profile_network(Network("net", model=load_onnx(file)), [one], protocol=QUICK)
    assert found.measurement is None
    assert found.status == "build_failed"
    assert "runs PyTorch models" in found.failure
    assert "runs PyTorch models" in profile_table([found], [])


def test_inputs_of_an_onnx_model_need_sizes(file):
    model = load_onnx(file)
    assert onnx_inputs(model, 5)[0].shape == (5, 3, 8, 8)
    with pytest.raises(compressor.BackendError, match="--shape gives"):
        onnx_inputs(model, 1, ((1, 3, 9, 9),))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(compressor.BackendError, match="give its --shape"):
        onnx_inputs(model, 1)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(compressor.BackendError, match="batch is fixed at 2"):
        onnx_inputs(model, 1)


@pytest.mark.parametrize("damage", ["missing", "text", "cut"])
def test_a_file_that_is_no_onnx_is_said(file, tmp_path, damage):
    path = tmp_path / "bad.onnx"
    if damage != "missing":
        path.write_bytes(b"hello" if damage == "text" else file.read_bytes()[:300])
    with pytest.raises(compressor.DataError, match="no such file" if damage == "missing" else "no ONNX model, or cut off"):
        load_onnx(path)


@pytest.mark.quiet
def test_same_engine_twice_in_a_quiet_minute_agrees():
    """Two independent runs. The minute was quiet if both are ok and the sentinel took the same time in both."""
    network = compressor.trace(resnet20().eval(), (torch.randn(1, 3, 32, 32),))
    seen, quiet = [], []
    for _ in range(4):
        one, other = (compressor.profile(network) for _ in range(2))
        sentinels = [run.details["sentinel"]["median_ms"] for run in (one, other)]
        seen.append((one.status, other.status, sentinels[0] / sentinels[1], one.median_ms / other.median_ms))
        if one.status == other.status == "ok" and abs(sentinels[0] / sentinels[1] - 1) < 0.005:
            quiet.append(abs(one.median_ms / other.median_ms - 1))
            if quiet[-1] <= 0.015:
                return
        if len(quiet) == 3:  # a sentinel sees only what lasts; three times is no accident
            break
    if len(quiet) < 3:
        pytest.skip(f"no quiet minute: {seen}")
    assert min(quiet) <= 0.015, seen


def test_the_worker_runs_alone_on_any_python(tmp_path):
    """It is copied to devices: the standard library is enough to start it and to say what is missing."""
    from compressor.runtime.backends.tensorrt import WORKER

    copy = tmp_path / "worker.py"
    copy.write_bytes(WORKER.read_bytes())
    found = subprocess.run(
        ["python3", "-I", str(copy), "no_such_package"], input='{"op": "hello"}\n', capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout) == {"ok": False, "error": "No module named 'no_such_package'", "kind": "ModuleNotFoundError"}
