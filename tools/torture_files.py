"""One of every kind of file that is ever read, and its reader; see `torture.py`."""

import json
import shutil


class Net:
    """Made here, so that the module can be imported without torch."""

    def __new__(cls):
        import torch
        from torch import nn

        torch.manual_seed(0)
        torch.set_num_threads(1)
        layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def data():
    import torch

    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=draw), torch.randint(0, 4, (16,), generator=draw)) for _ in range(3)]


def compression(folder):
    import torch

    import compressor
    from compressor.pipeline.compression import Compression

    method = compressor.LeGR(population=3, trials=6, fitness=compressor.Fitness("none", holdout=16))
    return Compression(
        Net(), (torch.zeros(1, 3, 8, 8),), train=data(), validate=data()[:1], test=None, calibrate=None, method=method, seed=0,
        budget=compressor.Budget(macs=0.6), target=compressor.Target("fake"), finetune=compressor.FineTune(epochs=1),
        out=folder / "run", progress=compressor.Progress(),
    )  # fmt: skip


def make(folder):
    """One of every kind."""
    import numpy as np
    import torch
    from PIL import Image

    import compressor
    from compressor.pipeline.exporting import export_engine, from_run
    from compressor.runtime.measuring.measure import measure
    from compressor.runtime.measuring.store import MeasurementStore
    from compressor.runtime.timing.protocol import PROTOCOL, Protocol

    folder.mkdir()
    result = compression(folder).run()
    quick = Protocol(warm_up_s=0.01, settle_s=0.02, min_samples=6, max_samples=6, max_s=0.1)
    export_engine(from_run(folder / "run"), "onnx", folder / "engine", name="net", protocol=quick)
    export_engine(from_run(folder / "run"), "triton", folder / "repository", name="net", protocol=quick)
    compressor.export(result.graph, folder / "model.onnx")
    torch.save(Net().state_dict(), folder / "weights.pt")  # noqa: TID251 - what users bring
    shutil.copy(folder / "run" / "front" / "0" / "weights.safetensors", folder / "weights.safetensors")
    (folder / "plan.json").write_text(result.plan.to_json())
    (folder / "measurement.json").write_text(json.dumps(result.compressed.to_dict()))
    (folder / "structure.json").write_text(compressor.Structure((("a", 3), ("b", 7))).to_json())
    found = measure({"net": result.graph}, compressor.Target("fake"))["net"]
    store = MeasurementStore(folder / "latency.sqlite")
    for k in range(20):
        store.put(f"net {k}", found, PROTOCOL, {"reference_ms": 1.0, "blocks_ms": {"a": 1.0}, "rest_ms": 0.0})
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for k in range(8):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "images" / name / f"{k}.png")
    (folder / "cifar").mkdir()
    for name in (*[f"data_batch_{k}" for k in range(1, 6)], "test_batch"):
        rows = draw.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / "cifar" / f"{name}.bin").write_bytes(rows.tobytes())
    return "made"


# --- their readers: each returns what the undamaged files give


def _state(graph):
    from compressor.values.files import digest_of_tensors

    return digest_of_tensors(graph.state_dict())


def read_network(folder):
    import compressor

    return _state(compressor.load(folder / "run"))


def read_unsigned_network(folder):
    """A stranger's file: there is no digest to compare with."""
    from compressor.passes.tracing.network_reading import network_from
    from compressor.values.files import read_bytes

    graph = network_from(read_bytes(folder / "run" / "front" / "0" / "network.safetensors"))
    return len(list(graph.graph.nodes)) > 0  # whatever it holds: it is no code


def read_with_model(folder):
    import compressor

    return _state(compressor.load(folder / "run", Net()))


def resume(folder):
    result = compression(folder).run()
    shown = json.loads((folder / "run" / "result.json").read_text())
    shown.pop("latency_ms"), shown.pop("budget")
    for name in ("plan.json", "weights.safetensors", "network.safetensors", "model.onnx", "measurement.json"):
        assert (folder / "run" / "front" / "0" / name).is_file(), f"{name} is missing"
    return _state(result.graph), result.plan.to_json(), json.dumps(shown, sort_keys=True)


def search_again(folder):
    """The plan is not there: the search is read from its study, whose trials may have been changed."""
    from compressor.values.plan import Plan

    shutil.rmtree(folder / "run" / "front")
    for name in ("progress.json", "files.json"):
        (folder / "run" / name).unlink()
    again = compression(folder)
    with again._run:  # what comes after the search reads nothing more of it
        return all(isinstance(plan, Plan) for plan in again._planning.plans())


def read_engine(folder):
    import numpy as np

    from compressor.runtime.engines.manifest import load_engine

    with load_engine(folder / "engine" / "net.onnx") as engine:
        return float(np.asarray(engine.run([np.ones((1, 3, 8, 8), np.float32)])[0]).sum())


def read_onnx(folder):
    from compressor.runtime.onnx.read import load_onnx

    return len(load_onnx(folder / "model.onnx").graph.node) > 0


def run_onnx(folder):
    """An ONNX file of the user's, measured."""
    import numpy as np

    from compressor.errors import BackendError
    from compressor.pipeline.profiling import onnx_inputs
    from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine
    from compressor.runtime.onnx.read import load_onnx
    from compressor.values.target import Target

    model = load_onnx(folder / "model.onnx")
    example = onnx_inputs(model, 1)
    if sum(x.numel() for x in example) > 1 << 24:
        raise BackendError("inputs of that size are not made here")
    with OnnxRuntimeEngine(model.SerializeToString(), example, Target()) as engine:
        return len(engine.run([np.asarray(x) for x in example])) > 0


def read_repository(folder):
    from compressor.runtime.engines.triton import validate_repository

    return isinstance(validate_repository(folder / "repository"), dict)


def read_store(folder):
    import compressor
    from compressor.runtime.measuring.store import MeasurementStore
    from compressor.runtime.timing.protocol import PROTOCOL

    store, target = MeasurementStore(folder / "latency.sqlite"), compressor.Target("fake").fingerprint()
    for k in range(20):
        found = store.get(f"net {k}", target, PROTOCOL)
        if found is not None:
            store.put(f"net {k}", found[0], PROTOCOL, found[1])
    return len(store) >= 0


def read_weights(folder):
    from compressor.values.files import load_tensors

    return [len(load_tensors(folder / name)) > 0 for name in ("weights.pt", "weights.safetensors")]


def read_plan(folder):
    import compressor

    plan = compressor.Plan.load(folder / "plan.json")
    import torch

    graph = compressor.trace(Net(), (torch.zeros(1, 3, 8, 8),))
    return compressor.apply(plan, graph) is not None


def read_structure(folder):
    import compressor
    from compressor.values.files import read_bytes

    text = read_bytes(folder / "structure.json").decode(errors="replace")
    return isinstance(compressor.Structure.from_json(text), compressor.Structure)


def read_measurement(folder):
    from compressor.values.files import read_json
    from compressor.values.measurement import Measurement

    found = Measurement.from_dict(read_json(folder / "measurement.json"))
    return bool(str(found)) and bool(found.summary())


def read_images(folder):
    from compressor.data.images import load_data

    return [
        len(load_data(f"folder:{folder / 'images'}").train.labels) > 0,
        len(load_data(f"cifar10:{folder / 'cifar'}").train.labels) > 0,
    ]


MEMBER = "run/front/0/"
KINDS = {  # kind -> which files are damaged, and who reads them
    "network": ([f"{MEMBER}network.safetensors"], read_network),
    "network, no digest": ([f"{MEMBER}network.safetensors"], read_unsigned_network),
    "weights of a run": ([f"{MEMBER}weights.safetensors", f"{MEMBER}plan.json", "run/run.json", "run/files.json"], read_with_model),
    "run, resumed": (["run/*.json", f"{MEMBER}*", "run/facts/*", "run/trials/*", "run/run.lock"], resume),
    "study": (["run/study.db"], search_again),
    "engine": (["engine/net.onnx", "engine/net.onnx.manifest.json"], read_engine),
    "ONNX": (["model.onnx"], read_onnx),
    "ONNX, run": (["model.onnx"], run_onnx),
    "Triton repository": (["repository/net/config.pbtxt", "repository/net/1/*"], read_repository),
    "store": (["latency.sqlite"], read_store),
    "weights": (["weights.pt", "weights.safetensors"], read_weights),
    "plan": (["plan.json"], read_plan),
    "structure": (["structure.json"], read_structure),
    "measurement": (["measurement.json"], read_measurement),
    "images": (["images/*/*.png", "cifar/*.bin"], read_images),
}
