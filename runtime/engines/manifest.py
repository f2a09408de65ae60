"""Manifests: beside every exported engine, what it was built from, with what, on what, and how it did.

An engine runs only where it was built for, and says so late and badly. So loading reads the manifest first and refuses
a mismatch with the command that builds it anew.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from compressor.errors import BackendError, DataError
from compressor.runtime.backends import BACKENDS
from compressor.runtime.backends.base import Engine
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine
from compressor.runtime.backends.tensorrt import TensorRT
from compressor.runtime.onnx.read import load_onnx
from compressor.values.files import digest_of_file, read_json, write_sealed
from compressor.values.target import Target

SCHEMA = 1
SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        dtype: `float32`, `int64`, ...
        shape: Sizes; -1 for the batch where it is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """See the module.

    Attributes:
        file: Name of the engine file beside it.
        sha256: Of that file.
        form: `onnx`, `onnx-fp16`, `onnx-int8` or `tensorrt`.
        target: The target it was built for, as plain data.
        fingerprint: Fingerprint of that target when it was built.
        inputs: Inputs.
        outputs: Outputs.
        source: What it was built from: digests of architecture and weights, and the user's name for it.
        versions: With what.
        parity: Relative error (L2) against PyTorch in float32.
        latency: Summary of the measured latency; empty where it could not run on this machine.
        accuracy: Top-1 in percent, where validation data was given.
        max_batch: The largest batch it takes; 0 for any.
        rebuild: The command that builds it anew.
    """

    file: str
    sha256: str
    form: str
    target: Mapping[str, object]
    fingerprint: Mapping[str, object]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source: Mapping[str, object]
    versions: Mapping[str, str]
    parity: float | None = None
    latency: Mapping[str, object] = field(default_factory=dict)
    accuracy: float | None = None
    max_batch: int = 0
    rebuild: str = ""

    def write(self, folder: Path) -> Path:
        """Write it beside its engine."""
        path = folder / (self.file + SUFFIX)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_sealed(path, {"schema_version": SCHEMA, "created": created, **asdict(self)})
        return path

    def check(self) -> None:
        """Raise `TypeError` where a field is of another kind."""
        texts = {"file": self.file, "sha256": self.sha256, "form": self.form, "rebuild": self.rebuild}
        objects = {
            "target": self.target,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "versions": self.versions,
            "latency": self.latency,
        }
        for kind, fields in ((str, texts), (dict, objects), (int, {"max_batch": self.max_batch})):
            for name, value in fields.items():
                if not isinstance(value, kind):
                    raise TypeError(f"field `{name}` must be a {kind.__name__}, found {value!r:.80}")
        for name, number in (("parity", self.parity), ("accuracy", self.accuracy)):
            if not (number is None or isinstance(number, float | int)) or isinstance(number, bool):
                raise TypeError(f"field `{name}` must be a number, found {number!r:.80}")
        for tensor in (*self.inputs, *self.outputs):
            if tensor.dtype not in (*_DTYPES.values(), "unknown"):
                raise TypeError(f"tensor `{tensor.name:.80}` is of no known type: {tensor.dtype:.80}")

    @classmethod
    def read(cls, engine: Path) -> "Manifest":
        """Read the manifest of an engine file.

        Raises:
            DataError: There is none, or it is no manifest; the field is named.
        """
        path = engine.with_name(engine.name + SUFFIX)
        if not path.exists():
            raise DataError(f"{engine} has no manifest ({path.name}); was it written by `compressor export`?")
        data: dict[str, Any] = dict(read_json(path, "export the engine anew"))
        if data.pop("schema_version", None) != SCHEMA:
            raise DataError(f"{path}: field `schema_version` is not {SCHEMA}; export the engine anew")
        data.pop("created", None)
        try:
            for name in ("inputs", "outputs"):
                data[name] = tuple(
                    TensorSpec(str(t["name"]), str(t["dtype"]), tuple(int(s) for s in t["shape"])) for t in data[name]
                )
            found = cls(**data)
            found.check()
            return found
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"{path} is no manifest of this version: {error}") from error


def load_engine(file: Path) -> Engine:
    """Load an exported engine after checking its manifest against the file and this machine. Use as a context manager.

    Raises:
        DataError: File or manifest are missing or do not belong together.
        BackendError: It was built for another version or device; the message says how to rebuild it.
    """
    if not file.is_file():
        raise DataError(f"no such engine: {file}")
    manifest = Manifest.read(file)
    if digest_of_file(file) != manifest.sha256:
        raise DataError(f"{file} is not the file of its manifest (changed, or cut off); rebuild it: {manifest.rebuild}")
    try:
        target = Target(**dict(manifest.target))  # type: ignore[arg-type]
    except (TypeError, AttributeError) as error:
        raise DataError(f"{file.name}{SUFFIX} names no target of this version: {error}") from error
    if manifest.form.startswith("onnx"):
        load_onnx(file)
        return OnnxRuntimeEngine(file, (), Target(threads=target.threads))
    here = target.fingerprint()
    for name in ("backend_version", "device", "cc", "driver"):
        if here.get(name) != manifest.fingerprint.get(name):
            raise BackendError(
                f"{file.name} was built with {name} {manifest.fingerprint.get(name)!r}, here it is {here.get(name)!r}; "
                f"engines run only where they were built for. Rebuild it: {manifest.rebuild}"
            )
    backend = BACKENDS[target.backend]()
    if not isinstance(backend, TensorRT):
        raise BackendError(f"{file.name}: the back end `{target.backend}` loads no engine files")
    return backend.load(file, target)


_DTYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.DOUBLE: "float64", TensorProto.INT64: "int64",
    TensorProto.INT32: "int32", TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.BOOL: "bool",
}  # fmt: skip


def specs_of(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX model."""
    stored = {item.name for item in model.graph.initializer}
    return _specs([i for i in model.graph.input if i.name not in stored]), _specs(model.graph.output)


def _specs(items: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            item.name,
            _DTYPES.get(item.type.tensor_type.elem_type, "unknown"),
            tuple(d.dim_value if d.HasField("dim_value") else -1 for d in item.type.tensor_type.shape.dim),
        )
        for item in items
    )
