"""Files from strangers: none runs code, whatever is put into it."""

import json
import os
import pickle  # noqa: TID251 - what attackers bring
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load, save

import compressor
from compressor.errors import CompressorError, DataError
from compressor.passes.tracing.network_file import network_bytes
from compressor.passes.tracing.network_reading import network_from
from compressor.pipeline.exporting import from_run
from compressor.runtime.engines.manifest import Manifest, load_engine
from compressor.runtime.onnx.read import load_onnx
from compressor.values.files import load_tensors
from tests.networks import Residual, randomize


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """A folder that is there if code ran."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code of the file ran"


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    return network_bytes(compressor.trace(randomize(Residual()).eval(), (torch.zeros(1, 3, 8, 8),)))


def described(data):
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["network"])


def rewritten(data, change):
    """The file with another description."""
    found = described(data)
    change(found)
    return save(load(data), {"network": json.dumps(found)})


def test_the_network_file_gives_the_network_back(good):
    graph = network_from(good)
    x = torch.randn(3, 3, 8, 8)
    torch.manual_seed(0)
    model = randomize(Residual()).eval()
    with torch.no_grad():
        assert torch.equal(graph(x), compressor.trace(model, (torch.zeros(1, 3, 8, 8),))(x))
    assert network_bytes(graph) == good
    assert compressor.analyze(graph).free


@pytest.mark.parametrize("place", ["program.pt2", "network.safetensors", "weights.safetensors"])
def test_pickles_in_a_run_are_not_read(tmp_path, trap, place):
    for name in ("program.pt2", "network.safetensors", "weights.safetensors"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for inside in ("archive/data.pkl", "archive/data/sample_inputs/model.pt", "archive/data/constants/model.pt"):
                archive.writestr(inside, pickle.dumps(Bomb(trap)) if name == place else b"")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"inputs": [[[1, 3, 8, 8], "float32"]]}}))
    for call in (lambda: compressor.load(tmp_path), lambda: compressor.load(tmp_path, Residual()), lambda: from_run(tmp_path)):
        with pytest.raises(CompressorError):
            call()


def test_an_exported_program_of_older_versions_is_refused_with_the_way_on(tmp_path, trap):
    torch.export.save(torch.export.export(Residual().eval(), (torch.zeros(1, 3, 8, 8),)), tmp_path / "program.pt2")
    with pytest.raises(DataError, match=r"could run code: load it with the model"):
        compressor.load(tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin"])
def test_pickles_in_weights_are_not_run(tmp_path, trap, name):
    torch.save({"conv.weight": torch.zeros(1), "x": Bomb(trap)}, tmp_path / name)  # noqa: TID251
    with pytest.raises(DataError, match="not a file of plain tensors"):
        load_tensors(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(DataError, match="not a file of plain tensors"):
        load_tensors(tmp_path / name)


TARGETS = (
    "torch.serialization.os.system", "os.system", "aten::from_file.default", "aten::save.default", "aten::warn.default",
    "aten::_print.default", "mylib::run.default", "builtins.eval", "aten::__class__.default", "prim::Print.default",
    "operator.attrgetter", "aten::conv2d.__init__", "aten::len.Dict_str",
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_no_function_but_ops_can_be_named(good, target):
    def change(found):
        call = next(node for node in found["nodes"] if node["op"] == "call_function")
        call["target"] = target

    with pytest.raises(DataError):
        network_from(rewritten(good, change))


CODE = "__import__('os').mkdir('{}')"
NAMES = ("x): pass\n{}\ndef f(y", 'a"], {}, self["b', "a'); {}; ('", "a\n{}", "lambda", "{}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["name", "target", "argument", "module", "tensor", "keyword", "dtype"])
def test_names_that_would_be_code_are_refused(good, trap, name, field):
    text = name.replace("{}", CODE.format(trap))

    def change(found):
        nodes = found["nodes"]
        call = next(node for node in nodes if node["op"] == "call_function")
        module = next(node for node in nodes if node["op"] == "call_module")
        if field == "name":
            call["name"] = text
        elif field == "target":
            module["target"] = text
        elif field == "argument":
            found["arguments"] = [text]
        elif field == "module":
            found["modules"][text] = found["modules"].pop(module["target"])
        elif field == "tensor":
            found["kinds"][text] = found["kinds"].pop(next(iter(found["kinds"])))
        elif field == "keyword":
            call["kwargs"] = {"dict": [[text, 1]]}
        else:
            found["meta"]["inputs"][0][1] = text

    with pytest.raises(DataError):
        network_from(rewritten(good, change))


@pytest.mark.parametrize("kind", ["Sequential", "Module", "Embedding", "__class__", "ReLU"])
def test_no_module_but_those_of_the_list(good, kind):
    def change(found):
        next(iter(found["modules"].values()))["class"] = kind

    with pytest.raises(DataError):
        network_from(rewritten(good, change))


def test_a_network_file_that_claims_a_giant_is_refused_at_once(good):
    def change(found):
        conv = next(about for about in found["modules"].values() if about["class"] == "Conv2d")
        conv["in_channels"] = 1 << 40

    with pytest.raises(DataError):
        network_from(rewritten(good, change))


def tiny(tmp_path, *, tensor=None, domain="", name="model.onnx"):
    weight = tensor or helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    node = helper.make_node("Add", ["x", "w"], ["y"], domain=domain)
    sides = [helper.make_tensor_value_info(side, TensorProto.FLOAT, [1, 4]) for side in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", sides[:1], sides[1:], [weight]))
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    (tmp_path / name).write_bytes(model.SerializeToString())
    return tmp_path / name


def outside(location, length=16):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_tensors_beside_a_model_are_read_from_its_folder_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"secret of the user")
    (folder / "own").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    assert load_onnx(tiny(folder, tensor=outside("own"))).graph.initializer[0].raw_data == bytes(16)
    for location in ("../secret", str(tmp_path / "secret"), "link", "pipe", "", "missing", "own/../../secret"):
        with pytest.raises(DataError, match="no part of a plain file"):
            load_onnx(tiny(folder, tensor=outside(location)))
    with pytest.raises(DataError, match="no part of a plain file"):
        load_onnx(tiny(folder, tensor=outside("own", 1 << 40)))


def test_ops_of_other_makers_are_refused(tmp_path):
    with pytest.raises(DataError, match="op of another maker"):
        load_onnx(tiny(tmp_path, domain="evil.ops"))


@pytest.mark.parametrize("dims", [[1 << 40], [1 << 31, 1 << 31], [-4]])
def test_a_tensor_has_to_be_the_size_of_its_data(tmp_path, dims):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, raw_data=bytes(16))
    tensor.dims.extend(dims)
    with pytest.raises(DataError, match="tensor `w` has the shape"):
        load_onnx(tiny(tmp_path, tensor=tensor))


def test_an_engine_is_checked_before_it_is_opened(tmp_path):
    file = tiny(tmp_path, domain="evil.ops", name="net.onnx")
    about = {"target": compressor.Target().to_dict(), "fingerprint": {}, "inputs": (), "outputs": (), "source": {}, "versions": {}}
    from compressor.values.files import digest_of_file

    Manifest(file="net.onnx", sha256=digest_of_file(file), form="onnx", **about).write(tmp_path)
    with pytest.raises(DataError, match="op of another maker"):
        load_engine(file)


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path):
    import struct
    import zlib

    from compressor.data.images import load_data

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10 GB of pixels
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"0\.png"):
        load_data(f"folder:{tmp_path}")


def test_nothing_in_the_code_unpickles():
    root = Path(compressor.__file__).parent
    files = [file for folder in (root, root / "passes", root / "runtime") for file in folder.resolve().rglob("*.py")]
    assert len(files) > 150
    for file in files:
        for word in ("torch.export.load", "pickle.load", "weights_only=False", "allow_pickle=True", "joblib"):
            assert word not in file.read_text(), f"{file}: {word}"


def test_onnx_files_of_ours_are_taken(tmp_path):
    graph = compressor.trace(randomize(Residual()).eval(), (torch.zeros(1, 3, 8, 8),))
    compressor.export(graph, tmp_path / "net.onnx")
    assert load_onnx(tmp_path / "net.onnx") == onnx.load(tmp_path / "net.onnx")


def changed(good, change):
    with pytest.raises(DataError):
        network_from(rewritten(good, change))


def first(found, op):
    return next(node for node in found["nodes"] if node["op"] == op)


def test_defaults_of_inputs_are_no_place_for_code(good, trap):
    """Fx cuts the text of an input at its first colon, also within quotes."""
    code = f";torch.__dict__[{CODE.format(trap)}]#"

    def change(found):
        first(found, "placeholder")["args"] = {"tuple": [":"]}
        second = {"op": "placeholder", "name": "b", "target": "b", "args": {"tuple": [code]}, "kwargs": {"dict": []}, "value": None}
        found["nodes"].insert(1, {**second, "stack": []})
        found["arguments"].append("b")

    changed(good, change)


@pytest.mark.parametrize("target", ["torch.os.environ", "torch.nn.functional.relu", "math_ceil"])
def test_an_input_is_no_place_to_write_to(good, target):
    changed(good, lambda found: first(found, "placeholder").update(target=target))


@pytest.mark.parametrize("target", ["load_state_dict.__func__.__builtins__", "forward", "training", "conv1"])
def test_tensors_of_the_file_alone_are_read(good, target):
    def change(found):
        node = {"op": "get_attr", "name": "got", "target": target, "args": {"tuple": []}, "kwargs": {"dict": []}, "value": None}
        found["nodes"].insert(1, {**node, "stack": []})

    changed(good, change)


@pytest.mark.parametrize("name", ["self", "__class__"])
def test_no_node_takes_the_place_of_the_network(good, name):
    changed(good, lambda found: first(found, "call_module").update(name=name))


HARMFUL = ("_reshape_alias.default", "as_strided.default", "set_grad_enabled.default", "manual_seed.default", "empty.memory_format",
           "resize_.default", "_local_scalar_dense.default", "segment_reduce.default")  # fmt: skip


@pytest.mark.parametrize("op", HARMFUL)
def test_ops_that_read_beyond_a_tensor_or_change_settings_are_refused(good, op):
    changed(good, lambda found: first(found, "call_function").update(target=f"aten::{op}"))


META = (
    {"inputs": [[[1 << 50], "float32"]]}, {"inputs": [[[-3, 3], "float32"]]}, {"inputs": [[[1, 3, 8, 8], "bits8"]]}, {"inputs": []},
    {"dynamic": "false"}, {"batch": 0}, {"batch": "x"}, {"inputs": [[[8.9], "float32"]]},
)  # fmt: skip


@pytest.mark.parametrize("meta", META, ids=str)
def test_what_inputs_are_is_checked(good, meta):
    changed(good, lambda found: found["meta"].update(meta))


def test_many_tensors_are_loaded_in_time(good):
    import time

    def change(found):
        name = next(iter(found["kinds"]))
        found["tied"].update({f"t{k}": name for k in range(20_000)})

    begun = time.monotonic()
    network_from(rewritten(good, change))
    assert time.monotonic() - begun < 5


def test_sparse_tensors_and_giants_from_shapes_are_refused(tmp_path):
    model = onnx.load(tiny(tmp_path))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [0]))
    sparse.dims.append(400_000_000)
    (tmp_path / "sparse.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="sparse"):
        load_onnx(tmp_path / "sparse.onnx")
    model = onnx.load(tiny(tmp_path))
    model.graph.initializer.append(helper.make_tensor("n", TensorProto.INT64, [1], [200_000_000]))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["n"], ["big"]))
    (tmp_path / "giant.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="makes a tensor of the shape"):
        load_onnx(tmp_path / "giant.onnx")


def test_databases_with_views_are_not_read(tmp_path):
    import contextlib
    import sqlite3

    from compressor.runtime.measuring.store import MeasurementStore
    from compressor.search.storage import open_storage

    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r"
    for name in ("studies", "measurements"):
        with contextlib.closing(sqlite3.connect(tmp_path / f"{name}.db")) as connection:
            connection.execute(f"CREATE VIEW {name} AS {endless}")
            connection.execute("PRAGMA user_version = 1")
            connection.commit()
    with pytest.raises(DataError, match="views or triggers"):
        open_storage(f"sqlite:///{tmp_path / 'studies.db'}")
    store = MeasurementStore(tmp_path / "measurements.db")
    assert len(store) == 0
    assert list(tmp_path.glob("measurements.db.set-aside-*")), "it was set aside"


@pytest.mark.parametrize("place", ["facts", "trials", "front"])
def test_a_run_writes_into_its_own_folder_alone(tmp_path, place):
    from compressor.runs.folder import Run

    (tmp_path / "outside").mkdir()
    with Run(tmp_path / "run", {}):
        pass
    (tmp_path / "run" / place).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="is a link"), Run(tmp_path / "run", {}):
        pass


@pytest.mark.parametrize("fields", [{"threads": 1 << 40}, {"threads": 3000}, {"batch": 1 << 40}, {"align": 0}])
def test_targets_have_bounds(fields):
    with pytest.raises(CompressorError, match="must be a positive integer up to"):
        compressor.Target(**fields)
