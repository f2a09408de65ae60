"""Model repositories for Triton Inference Server: written, and checked for what Triton finds only at request time.

    <repository>/<model>/config.pbtxt
    <repository>/<model>/<version>/model.onnx or model.plan
    <repository>/<model>/<model file>.manifest.json        Triton ignores it

The configuration is built from Triton's own protobuf classes (`tritonclient`, extra `triton`), so that an unknown field
or a wrong enum cannot be written.
"""

import hashlib
import re
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import BackendError, DataError
from compressor.runtime.engines.manifest import SUFFIX, Manifest, TensorSpec
from compressor.values.files import write_bytes

_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "float64": "TYPE_FP64", "int64": "TYPE_INT64", "int32": "TYPE_INT32",
    "int8": "TYPE_INT8", "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL",
}  # fmt: skip
_LONGEST = 100
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class Serving:
    """How a server is to run a model.

    Attributes:
        max_batch: Largest batch that the server forms; 0 for a network whose batch is fixed.
        preferred: Batch sizes that it forms rather than others.
        delay_us: How long a request may wait for others, in microseconds.
        instances: Copies of the model.
        gpu: Whether they run on a GPU.
        threads: CPU threads within an op (ONNX Runtime on CPUs).
        warm_up: Whether to run the model once before it is served.
    """

    max_batch: int = 8
    preferred: tuple[int, ...] = ()
    delay_us: int = 500
    instances: int = 1
    gpu: bool = False
    threads: int = 1
    warm_up: bool = True


def safe_name(name: str) -> str:
    """A name that is legal as a folder, in Triton, and in a URL; equal names stay equal, different ones different.

    Letters, digits, `_`, `-` and inner dots stay; everything else becomes `_`. Where that changes or shortens the name
    (100 characters at most) eight digits of its SHA-256 are added.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", plain)
    plain = re.sub(r"\.{2,}", "_", plain).strip("._-") or "model"
    if plain == name and len(plain) <= _LONGEST:
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: _LONGEST - 9].rstrip('._-')}-{digest}"


def write_repository(engine: Path, repository: Path, name: str, serving: Serving, version: int = 1) -> Path:
    """Put an exported engine into a model repository.

    Args:
        engine: The engine file, its manifest beside it.
        repository: The repository; other models in it are left alone, other versions of this one too.
        name: The model's name; made safe.
        serving: How to serve it.
        version: Number of the version's folder, from 1.

    Returns:
        The model's folder.

    Raises:
        DataError: The engine has no manifest.
        BackendError: tritonclient is missing, or the result would not be servable; all reasons are given.
    """
    manifest = Manifest.read(engine)
    backend = "onnxruntime" if manifest.form.startswith("onnx") else "tensorrt"
    folder = repository / safe_name(name)
    config = _config(folder.name, backend, manifest, serving)
    place = folder / str(version) / FILES[backend]
    write_bytes(place, engine.read_bytes())
    shutil.copyfile(engine.with_name(engine.name + SUFFIX), folder / (FILES[backend] + SUFFIX))
    write_bytes(folder / "config.pbtxt", config.encode())
    problems = validate_model(folder)
    if problems:
        raise BackendError(f"{folder} would not be served: " + "; ".join(problems))
    return folder


def _config(name: str, backend: str, manifest: Manifest, serving: Serving) -> str:
    pb, text_format = _protobuf()
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=serving.max_batch)
    for specs, tensors in ((manifest.inputs, config.input), (manifest.outputs, config.output)):
        for spec in specs:
            tensor = tensors.add(name=spec.name, data_type=pb.DataType.Value(_TYPES[spec.dtype]))
            tensor.dims.extend(spec.shape[1:] if serving.max_batch else spec.shape)
    kind = pb.ModelInstanceGroup.KIND_GPU if serving.gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(kind=kind, count=serving.instances)
    if serving.max_batch > 1:
        config.dynamic_batching.preferred_batch_size.extend(serving.preferred)
        config.dynamic_batching.max_queue_delay_microseconds = serving.delay_us
    if backend == "onnxruntime" and not serving.gpu:
        config.parameters["intra_op_thread_count"].string_value = str(serving.threads)
    if serving.warm_up:
        warm = config.model_warmup.add(name="random", batch_size=1 if serving.max_batch else 0)
        for spec in manifest.inputs:
            entry = warm.inputs[spec.name]
            entry.data_type, entry.random_data = pb.DataType.Value(_TYPES[spec.dtype]), True
            entry.dims.extend(spec.shape[1:] if serving.max_batch else spec.shape)
    text: str = text_format.MessageToString(config)
    if not serving.max_batch:  # a zero is not printed, and a server without it may complete another value
        text = text_format.MessageToString(pb.ModelConfig(name=name)) + "max_batch_size: 0\n" + text.split("\n", 1)[1]
    return text


def validate_repository(repository: Path) -> dict[str, list[str]]:
    """Model -> what is wrong with it; empty lists for what is servable.

    Raises:
        DataError: There is no such folder, or no model in it.
    """
    if not repository.is_dir():
        raise DataError(f"no such model repository: {repository}")
    found = {path.name: validate_model(path) for path in sorted(repository.iterdir()) if path.is_dir()}
    if not found:
        raise DataError(f"{repository} holds no model folder")
    return found


def validate_model(folder: Path) -> list[str]:
    """What is wrong with a model's folder: what Triton refuses at load, and what it finds only when a request comes."""
    pb, text_format = _protobuf()
    file = folder / "config.pbtxt"
    if not file.is_file():
        return ["there is no config.pbtxt"]
    config = pb.ModelConfig()
    try:
        text_format.Parse(file.read_text(encoding="utf-8"), config)
    except (text_format.ParseError, OSError, ValueError) as error:
        return [f"config.pbtxt: {error}"]
    problems = []
    if config.name and config.name != folder.name:
        problems.append(f"the name is {config.name!r}, the folder {folder.name!r}")
    if config.backend not in FILES:
        return [*problems, f"the back end is {config.backend!r}; known are {', '.join(FILES)}"]
    problems += _versions(folder, FILES[config.backend])
    preferred = list(config.dynamic_batching.preferred_batch_size)
    if any(size > config.max_batch_size for size in preferred):
        problems.append(f"preferred batch sizes {preferred} exceed max_batch_size {config.max_batch_size}")
    return problems + _against_manifest(config, folder / (FILES[config.backend] + SUFFIX), pb)


def _versions(folder: Path, name: str) -> list[str]:
    folders = [path for path in folder.iterdir() if path.is_dir()]
    legal = [path for path in folders if re.fullmatch(r"[1-9][0-9]*", path.name)]
    wrong = [f"{path.name!r} is no version (a positive number without leading zeros)" for path in folders if path not in legal]
    if not legal:
        return [*wrong, "there is no version folder"]
    return wrong + [f"version {path.name} holds no {name}" for path in legal if not (path / name).is_file()]


def _against_manifest(config: Any, path: Path, pb: Any) -> list[str]:
    """Names, types and sizes of the configuration against what the engine really takes."""
    if not path.exists():
        return [f"there is no {path.name} to check the inputs against"]
    manifest = Manifest.read(path.with_name(path.name.removesuffix(SUFFIX)))
    problems = _tensors("input", config.input, manifest.inputs, config.max_batch_size, pb)
    problems += _tensors("output", config.output, manifest.outputs, config.max_batch_size, pb)
    if config.max_batch_size and any(spec.shape[:1] != (-1,) for spec in manifest.inputs):
        problems.append(f"max_batch_size is {config.max_batch_size}, but the model's batch is fixed: set it to 0")
    if manifest.max_batch and config.max_batch_size > manifest.max_batch:
        problems.append(f"max_batch_size is {config.max_batch_size}, the engine was built for at most {manifest.max_batch}")
    return problems


def _tensors(what: str, found: Sequence[Any], specs: Sequence[TensorSpec], max_batch: int, pb: Any) -> list[str]:
    by_name = {spec.name: spec for spec in specs}
    problems = [f"the model has no {what} {t.name!r}; it has {', '.join(by_name)}" for t in found if t.name not in by_name]
    missing = set(by_name) - {t.name for t in found}
    problems += [f"{what} {name!r} of the model is not configured" for name in sorted(missing) if what == "input"]
    for tensor in found:
        spec = by_name.get(tensor.name)
        if spec is None:
            continue
        if pb.DataType.Name(tensor.data_type) != _TYPES.get(spec.dtype):
            problems.append(f"{what} {tensor.name!r} is {pb.DataType.Name(tensor.data_type)}, the model's is {spec.dtype}")
        expected = list(spec.shape[1:] if max_batch else spec.shape)
        if list(tensor.dims) != expected:
            counted = "without the batch" if max_batch else "with the batch, as max_batch_size is 0"
            problems.append(f"{what} {tensor.name!r} has dims {list(tensor.dims)}, the model's are {expected} ({counted})")
    return problems


def _protobuf() -> tuple[Any, Any]:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise BackendError("model repositories need tritonclient: pip install 'fx-compressor[triton]'") from error
    return model_config_pb2, text_format


def perf_analyzer_command(name: str, serving: Serving) -> str:
    """The perf_analyzer command that loads the served model."""
    batch = f" -b {serving.max_batch}" if serving.max_batch else ""
    return (
        f"perf_analyzer -m {name} -u localhost:8001 -i grpc{batch} --concurrency-range 1:8:2 --measurement-mode count_windows "
        "--percentile 95 --profile-export-file perf.json"
    )
