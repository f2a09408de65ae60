"""Damaged and hostile files: every one has to be answered, and none may change a result without a word.

    python tools/torture.py --files [--count 2000] [--seed 0] [--only KIND ...] [--out tools/results/torture-files.json]

Makes one of every kind of file that is ever read, damages copies of it (bytes flipped, cut, repeated; values of JSON replaced;
a pipe, a folder or a loop of links in its place), and reads each in a process of its own with a limit of time and memory.
What came of it: `clean` (a CompressorError), `harmless` (read, and the result is that of the undamaged file), `changed`,
`raw` (any other exception), `hang`, `killed`. The last four must be 0.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
RESULTS = Path(__file__).parent / "results" / "torture-files.json"
OUTCOMES = ("clean", "harmless", "changed", "raw", "hang", "killed")
LIMIT_S, LIMIT_BYTES = 60, 2 << 30
BAD = ("changed", "raw", "hang", "killed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="what there is to torture, so far")
    parser.add_argument("--count", type=int, default=2000, help="mutations over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="kinds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = torture(arguments.count, arguments.seed, arguments.only)
    arguments.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sys.exit(1 if any(row[bad] for row in rows for bad in BAD) else 0)


def torture(count, seed, only=None):
    """One row per kind; prints the table, and every mutation that was not answered."""
    preload()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["COMPRESSOR_CACHE"] = str(home / "cache")
        forked(make, home / "good")
        kinds = [kind for kind in KINDS if not only or kind in only]
        rows, each = [], -(-count // len(kinds))
        print(f"seed {seed}, {each} mutations of each of {len(kinds)} kinds")
        print("kind".ljust(24), "tried", *(outcome.rjust(9) for outcome in OUTCOMES))
        for kind in kinds:
            found = of_kind(kind, home, each, random.Random(f"{seed} {kind}"))
            rows.append({"kind": kind, "seed": seed, "tried": each, **{name: found[name] for name in OUTCOMES}})
            print(kind.ljust(24), str(each).rjust(5), *(str(found[name]).rjust(9) for name in OUTCOMES), flush=True)
        return rows


def preload():
    """Import once what every process needs; nothing that starts a thread runs before the forks."""
    import torch

    torch.set_num_threads(1)
    for name in (
        "onnxruntime", "optuna", "PIL.Image", "compressor.pipeline.exporting", "compressor.search.study", "torch.onnx",
        "onnxscript", "torch._dynamo", "torch.export", "compressor.data.images",
    ):  # fmt: skip
        importlib.import_module(name)


def of_kind(kind, home, count, draw):
    names, read = KINDS[kind]
    expected = forked(read, home / "good")
    assert expected[0] == "read", f"{kind}: the undamaged files are not read: {expected}"
    found = Counter()
    for k in range(count):
        work = home / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(home / "good", work, symlinks=True)
        name = draw.choice([str(path.relative_to(work)) for pattern in names for path in sorted(work.glob(pattern))])
        said = damage(work / name, draw)
        outcome = forked(read, work)
        verdict = outcome[0] if outcome[0] != "read" else "harmless" if outcome == expected else "changed"
        found[verdict] += 1
        if verdict in BAD:
            print(f"  {kind} {k}: {name}, {said}: {verdict} {str(outcome[1])[:300]}", flush=True)
    return found


def forked(work, folder):
    """What `work(folder)` comes to in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(work, folder, theirs))
    process.start()
    theirs.close()
    limit = LIMIT_S if work is not make else 600
    outcome = ("hang", f"no answer within {limit} s")
    if ours.poll(limit):
        try:
            outcome = ours.recv()
        except EOFError:
            process.join()
            outcome = ("killed", f"exit code {process.exitcode}")
    process.kill()
    process.join()
    if work is make and outcome[0] != "read":
        raise SystemExit(f"the files could not be made: {outcome}")
    return outcome


def _in_process(work, folder, answer):
    from compressor.errors import CompressorError

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if work is not make:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    try:
        outcome = ("read", work(folder))
    except CompressorError as error:
        outcome = ("clean", str(error))
    except BaseException as error:
        outcome = ("raw", f"{type(error).__name__}: {error}")
    answer.send(outcome)
    os._exit(0)


# --- the files


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
        return all(isinstance(plan, Plan) for plan in again._plans())


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


# --- damage


def damage(path, draw):
    """Damage a file; what was done, in words."""
    choices = [_bytes, _bytes, _bytes, _place]
    if path.suffix in (".json", ".lock") or path.name == "config.pbtxt":
        choices = [_json, _json, _json, _bytes, _place]
    return draw.choice(choices)(path, draw)


def _bytes(path, draw):
    held = bytearray(path.read_bytes())
    size = max(len(held), 1)
    kind = draw.choice(("flip", "flip", "cut", "empty", "zero", "insert", "repeat", "remove", "text"))
    at, length = draw.randrange(size), draw.choice((1, 4, 64, 1000))
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 3, 30))):
            where = draw.choice((draw.randrange(size), draw.randrange(min(size, 4096))))
            if held:
                held[where] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del held[at:]
    elif kind == "empty":
        held.clear()
    elif kind == "zero":
        held[at : at + length] = bytes(len(held[at : at + length]))
    elif kind == "insert":
        held[at:at] = draw.randbytes(length)
    elif kind == "repeat":
        held[at:at] = held[at : at + length]
    elif kind == "remove":
        del held[at : at + length]
    else:
        held[at : at + 8] = draw.choice((b"99999999", b"-1", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"null", b'"'))
    path.write_bytes(bytes(held))
    return f"{kind} {length} at {at} of {size}"


def _json(path, draw):
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return _bytes(path, draw)
    places = list(_places(value))
    if not places:
        return _bytes(path, draw)
    holder, key = draw.choice(places)
    kind = draw.choice(("replace", "replace", "replace", "remove", "rename", "deep", "digits"))
    if kind == "remove":
        holder.pop(key)
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = "@@" if kind in ("deep", "digits") else draw.choice(ODD)
    text = json.dumps(value)
    text = text.replace('"@@"', "[" * 200_000 + "]" * 200_000 if kind == "deep" else "9" * 5000)
    path.write_text(text)
    return f"{kind} {key!r}"


ODD = (
    None, True, False, -1, 0, 1, 3, 10**15, 2**62, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "\0", "é" * 5000, [], [[]], [-1], [1e999], {}, {"a": {}}, ["x", None], "facts/../../../x.json", "float99",
)  # fmt: skip


def _places(value):
    """Every place of a JSON value that something else can be put into."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _place(path, draw):
    kind = draw.choice(("missing", "pipe", "folder", "loop", "link out", "unreadable"))
    if kind == "unreadable":
        path.chmod(0)
        return kind
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link out":
        path.symlink_to("/etc/passwd")
    return kind


if __name__ == "__main__":
    begun = time.monotonic()
    try:
        main()
    finally:
        print(f"{time.monotonic() - begun:.0f} s")
