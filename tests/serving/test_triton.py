"""Model repositories: what is written is served by the real Triton with PyTorch's answers; the validator finds what is wrong."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import compressor
from compressor.pipeline.exporting import export_engine, from_graph
from compressor.runtime.engines.triton import Serving, safe_name, validate_model, validate_repository, write_repository
from tests.networks import QUICK, Residual, randomize, residual_graph

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


@pytest.fixture(scope="module")
def graph():
    return residual_graph()


@pytest.fixture(scope="module")
def repository(graph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    serving = Serving(max_batch=8, preferred=(4, 8), instances=2, delay_us=2000)
    export_engine(from_graph(graph, "residual"), "triton", folder, serving=serving, protocol=QUICK)
    fixed = compressor.trace(randomize(FixedBatch()).eval(), (torch.randn(2, 3, 8, 8),))
    export_engine(from_graph(fixed, "fixed"), "triton", folder, target=compressor.Target(batch=2), protocol=QUICK)
    return folder


class FixedBatch(Residual):
    def forward(self, x):
        return super().forward(x).reshape(2, 5)


def test_the_repository_has_triton_s_layout_and_nothing_else(repository):
    assert sorted(p.name for p in repository.iterdir()) == ["fixed", "residual"]
    files = sorted(str(p.relative_to(repository / "residual")) for p in (repository / "residual").rglob("*") if p.is_file())
    assert files == ["1/model.onnx", "config.pbtxt", "model.onnx.manifest.json"]
    assert validate_repository(repository) == {"fixed": [], "residual": []}
    assert "max_batch_size: 0" in (repository / "fixed" / "config.pbtxt").read_text()
    manifest = json.loads((repository / "residual" / "model.onnx.manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": [-1, 3, 8, 8]}]
    assert manifest["latency"]["median"] > 0
    assert manifest["parity"] < 1e-4


def test_the_real_server_gives_pytorch_s_answers_to_concurrent_requests(graph, repository, triton):
    from tritonclient import grpc

    inputs = [torch.randn(1 + k % 4, 3, 8, 8) for k in range(24)]

    def ask(address, name, x, output):
        with grpc.InferenceServerClient(address) as client:
            request = grpc.InferInput("x", list(x.shape), "FP32")
            request.set_data_from_numpy(x.numpy())
            return client.infer(name, [request]).as_numpy(output)

    with triton(repository) as address:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda x: ask(address, "residual", x, output_of(repository, "residual")), inputs))
        fixed = ask(address, "fixed", torch.randn(2, 3, 8, 8), output_of(repository, "fixed"))
        with grpc.InferenceServerClient(address) as client:
            statistics = client.get_inference_statistics("residual", as_json=True)["model_stats"][0]
    for x, y in zip(inputs, found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(np.array(y)), graph(x), rtol=1e-4, atol=1e-5)  # other kernels
    assert fixed.shape == (2, 5)
    rows = sum(len(x) for x in inputs)
    assert int(statistics["inference_count"]) >= rows
    assert int(statistics["execution_count"]) < rows, "requests were batched"


def output_of(repository, name):
    return json.loads((repository / name / "model.onnx.manifest.json").read_text())["outputs"][0]["name"]


BROKEN = {
    "unknown field": (lambda c: c + 'platfrom: "onnxruntime_onnx"\n', "no field named"),
    "name": (lambda c: c.replace('name: "residual"', 'name: "other"', 1), "the name is 'other', the folder 'residual'"),
    "input name": (lambda c: c.replace('name: "x"', 'name: "image"', 1), "the model has no input 'image'"),
    "type": (lambda c: c.replace("TYPE_FP32", "TYPE_FP16", 1), "is TYPE_FP16, the model's is float32"),
    "batch counted twice": (
        lambda c: c.replace("dims: 3", "dims: -1\n  dims: 3", 1),
        r"dims \[-1, 3, 8, 8\], the model's are \[3, 8, 8\]",
    ),
    "preferred": (lambda c: c.replace("preferred_batch_size: 8", "preferred_batch_size: 64"), "exceed max_batch_size 8"),
    "back end": (lambda c: c.replace('backend: "onnxruntime"', 'backend: "caffe"'), "known are onnxruntime, tensorrt"),
    "no batch": (lambda c: c.replace("max_batch_size: 8", "max_batch_size: 0"), "with the batch, as max_batch_size is 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_validator_finds_what_is_wrong(repository, tmp_path, name):
    change, message = BROKEN[name]
    folder = shutil.copytree(repository / "residual", tmp_path / "residual")
    text = (folder / "config.pbtxt").read_text()
    assert change(text) != text
    (folder / "config.pbtxt").write_text(change(text))
    found = validate_model(folder)
    assert found
    assert re.search(message, "; ".join(found)), found


@pytest.mark.parametrize("wreck", ["1/model.onnx", "config.pbtxt", "model.onnx.manifest.json", "versions"])
def test_missing_files_and_wrong_versions_are_found(repository, tmp_path, wreck):
    folder = shutil.copytree(repository / "residual", tmp_path / "residual")
    if wreck == "versions":
        (folder / "1").rename(folder / "01")
    else:
        (folder / wreck).unlink()
    assert validate_model(folder)


ODD = ["../../etc/passwd", "a/b/c", "größe 1", "", "..", ".hidden", "x" * 300, "con\nfig", "名前", "-rf", "a..b"]


def test_odd_names_become_legal_distinct_and_stay_themselves_where_they_are_legal():
    safe = [safe_name(name) for name in ODD]
    assert len(set(safe)) == len(ODD)
    for name in safe:
        assert 0 < len(name) <= 100
        assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
        assert name[0] not in ".-"
        assert ".." not in name
        assert safe_name(name) == name
    assert safe_name("resnet56-half_v1.2") == "resnet56-half_v1.2"


@pytest.mark.parametrize("name", ["../../escape", "a/b ü"])
def test_a_model_with_an_odd_name_stays_inside_the_repository(graph, tmp_path, name):
    found = export_engine(from_graph(graph, "net"), "triton", tmp_path / "repository", name=name, protocol=QUICK)
    assert found.path.parent == tmp_path / "repository"
    assert validate_model(found.path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]
    assert found.path.name in found.commands[1]


def test_a_tensorrt_engine_gets_its_own_configuration_and_its_limits_are_kept(graph, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    target = compressor.Target("tensorrt-rtx", batch=2, precision="fp16", options={"max_batch": 4})
    made = export_engine(from_graph(graph, "net"), "tensorrt", tmp_path / "engines", target=target, protocol=QUICK)
    folder = write_repository(made.path, tmp_path / "repository", "net", Serving(max_batch=4, gpu=True))
    text = (folder / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"' in text
    assert "KIND_GPU" in text
    assert (folder / "1" / "model.plan").read_bytes() == made.path.read_bytes()
    with pytest.raises(compressor.BackendError, match="the engine was built for at most 4"):
        write_repository(made.path, tmp_path / "repository", "large", Serving(max_batch=16, gpu=True))
    with pytest.raises(compressor.BackendError, match="not of TensorRT-RTX"):
        export_engine(from_graph(graph, "net"), "triton", tmp_path / "repository", target=target, protocol=QUICK)
