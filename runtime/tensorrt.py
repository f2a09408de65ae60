"""TensorRT (10.12 and newer, 11) and TensorRT-RTX: ONNX in, engine out, everything in a process of its own.

Creating a runtime without CUDA crashes some releases, a build may run out of memory or hang, and many devices have
TensorRT only in their system's Python. So `tensorrt_worker.py` does the work, run by the interpreter that
`COMPRESSOR_TENSORRT_PYTHON` names (this one by default); a worker that dies costs one candidate.

Networks are strongly typed: the precision is in the ONNX graph. TensorRT 8.5 and 8.6, which know no strong typing,
get the FP32 graph at opset 17 and a builder flag. Whatever built the engine, the types of its layers are looked at
afterwards: an engine that was to be FP16 or INT8 and is FP32 is refused.
"""

import glob
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import BackendError
from compressor.runtime.base import Arrays, Health, LayerTime, Workload
from compressor.runtime.onnx_export import LAYER
from compressor.runtime.precision import Int8
from compressor.runtime.timers import Sample, Timer
from compressor.runtime.timing import PROTOCOL
from compressor.runtime.worker_process import Progress, WorkerProcess
from compressor.store import cache_folder
from compressor.target import Option, Target

WORKER = Path(__file__).with_name("tensorrt_worker.py")
INTERPRETER = "COMPRESSOR_TENSORRT_PYTHON"
_OLD_OPSET = 17  # the newest that TensorRT 8 parses


class TensorRT:
    """Builds `TensorRTEngine`s."""

    package: ClassVar[str] = "tensorrt"
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    options: Mapping[str, Option] = {
        "optimization_level": 3,  # 0 to 5
        "tf32": False,
        "cuda_graph": True,
        "max_batch": 0,  # of the optimization profile; 0: the target's batch
        "version_compatible": False,
        "hardware_compatible": False,
        "strip_weights": False,
        "build_timeout_s": 900,
    }

    def interpreter(self) -> str:
        """The Python that runs the worker."""
        return os.environ.get(INTERPRETER) or sys.executable

    def worker(self) -> WorkerProcess:
        """Start a worker.

        Raises:
            BackendError: The interpreter cannot be started.
        """
        return _worker(self.package, self.interpreter())

    def build(self, workload: Workload, target: Target) -> "TensorRTEngine":
        """Build an engine and load it."""
        folder = tempfile.TemporaryDirectory(prefix="compressor-")
        worker = self.worker()
        try:
            file = Path(folder.name) / "engine"
            self.compile(workload, target, file, worker)
            model = workload.onnx(target.precision) if target.options["strip_weights"] else workload.onnx()
            return TensorRTEngine(worker, folder, file, target, workload.example, model)
        except BaseException:
            worker.close()
            folder.cleanup()
            raise

    def load(self, file: Path, target: Target, model: onnx.ModelProto | None = None) -> "TensorRTEngine":
        """Load an engine file, whoever built it.

        Args:
            file: The engine.
            target: What it was built for.
            model: What it was built from: refits an engine without weights, names its layers, and has its types checked.

        Raises:
            BackendError: It was built for another version or device, or there is no GPU.
        """
        folder = tempfile.TemporaryDirectory(prefix="compressor-")
        worker = self.worker()
        try:
            return TensorRTEngine(worker, folder, file, target, None, model)
        except BaseException:
            worker.close()
            folder.cleanup()
            raise

    def compile(
        self, workload: Workload, target: Target, file: Path, worker: WorkerProcess | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write an engine file; TensorRT-RTX needs no GPU for it.

        Args:
            workload: The network.
            target: The target; its batch is the profile's optimum, the option `max_batch` its maximum.
            file: Where to.
            worker: A running worker; without it one is started and stopped.
            progress: Called with `(phase, step, steps)`.

        Returns:
            `build_s`, `engine_bytes`, `network_types` (precision -> number of layers), `version`.

        Raises:
            BackendError: The worker cannot be started, the network is refused, or its layers are not of the
                target's precision.
        """
        own = worker or self.worker()
        try:
            hello = own.ask("hello", 180)
            model = self._model(workload, target, weak=bool(hello["weakly_typed"]))
            with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
                source = Path(folder) / "model.onnx"
                source.write_bytes(model.SerializeToString())
                settings = {k: v for k, v in target.options.items() if k not in ("cuda_graph", "max_batch", "build_timeout_s")}
                settings.update(onnx=str(source), engine=str(file), timing_cache=str(self._timing_cache(hello)))
                limit, profile = float(target.options["build_timeout_s"]), self.profile(target)
                found = own.ask("build", limit, progress, precision=target.precision, profile=profile, **settings)
        finally:
            if worker is None:
                own.close()
        if not hello["weakly_typed"]:
            _check_types(found["network_types"], target.precision)
        return {**found, "version": hello["version"], "device": hello["device"]}

    def profile(self, target: Target) -> list[int]:
        """Least, best and most batch of the optimization profile."""
        return [1, target.batch, max(int(target.options["max_batch"]), target.batch)]

    def _model(self, workload: Workload, target: Target, weak: bool) -> onnx.ModelProto:
        if not weak:
            return workload.onnx(target.precision)
        model = workload.onnx("int8", Int8(weight_pairs=True)) if target.precision == "int8" else workload.onnx()
        return _older(model)

    def _timing_cache(self, hello: Mapping[str, Any]) -> Path:
        """One file per version and device: a cache of another one is never used."""
        device = hello["device"] or {"name": "none", "cc": "", "driver": ""}
        name = "-".join(str(part) for part in (self.package, hello["version"], device["name"], device["cc"], device["driver"]))
        safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
        folder = cache_folder() / "timing_cache"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{safe}.bin"

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Device, driver and version, as the worker says."""
        del target
        hello = _greeting(self.package, self.interpreter())
        device = hello["device"] or {}
        return {
            "backend_version": hello["version"], "device": device.get("name", "none"), "cc": device.get("cc"),
            "driver": device.get("driver"), "cuda": device.get("cuda"), "protocol": PROTOCOL,
        }  # fmt: skip

    def check(self) -> Health:
        """Whether the worker finds the package and a GPU."""
        try:
            found = self.fingerprint(Target())
        except BackendError as error:
            remedy = f"pip install 'fx-compressor[{self.package.replace('_', '-')}]'"
            if self.package == "tensorrt":
                remedy += f", or set {INTERPRETER} to a Python that has it"
            return Health(False, str(error), remedy)
        if found["device"] == "none":
            can = "; engines can be built here, but not run" if self.package == "tensorrt_rtx" else ""
            return Health(
                False, f"{self.package} {found['backend_version']}, no CUDA device{can}", "run it on a machine with a GPU"
            )
        return Health(True, f"{self.package} {found['backend_version']} on {found['device']}, driver {found['driver']}")


class TensorRTRTX(TensorRT):
    """TensorRT for RTX: the same code; it builds without a GPU and has no timing cache."""

    package: ClassVar[str] = "tensorrt_rtx"

    def interpreter(self) -> str:
        """This one: the package comes from the ordinary registry."""
        return sys.executable


def _worker(package: str, interpreter: str) -> WorkerProcess:
    return WorkerProcess([interpreter, str(WORKER), package], package, _environment())


@cache
def _greeting(package: str, interpreter: str) -> dict[str, Any]:
    """What a worker says about itself: importing TensorRT takes seconds, and neither version nor device change meanwhile."""
    worker = _worker(package, interpreter)
    try:
        return worker.ask("hello", 180)
    finally:
        worker.close()


def _older(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model at the newest opset that TensorRT 8 parses."""
    if model.opset_import[0].version <= _OLD_OPSET:
        return model
    older = onnx.version_converter.convert_version(model, _OLD_OPSET)
    for node in older.graph.node:  # the converter leaves an attribute that this opset does not have
        kept = [a for a in node.attribute if not (node.op_type.startswith("Reduce") and a.name == "noop_with_empty_axes")]
        del node.attribute[:]
        node.attribute.extend(kept)
    return older


def _environment() -> dict[str, str]:
    """The worker's environment: another interpreter does not see the CUDA runtime that our PyTorch brings, so it is named."""
    patterns = (os.path.join(folder, "nvidia", "*", "lib", "libcudart.so.*") for folder in sys.path)
    found = next((file for pattern in patterns for file in sorted(glob.glob(pattern))), None)
    named = {"COMPRESSOR_CUDART": found} if found and "COMPRESSOR_CUDART" not in os.environ else {}
    return {**os.environ, **named}


def _check_types(found: Mapping[str, int], precision: str) -> None:
    wanted = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision]
    if found and not found.get(wanted):
        counts = ", ".join(f"{count} in {name}" for name, count in found.items())
        raise BackendError(f"the engine was to be {precision}, but its convolutions and matrix products are {counts}")


class TensorRTEngine:
    """An engine in its worker process. It ends with the `with` block."""

    def __init__(
        self,
        worker: WorkerProcess,
        folder: tempfile.TemporaryDirectory[str],
        file: Path,
        target: Target,
        example: Sequence[Tensor] | None = None,
        model: onnx.ModelProto | None = None,
    ) -> None:
        self._worker, self._folder, self._target = worker, folder, target
        refit = None
        if target.options["strip_weights"] and model is None:
            raise BackendError(f"{file.name} holds no weights; it is loaded together with the ONNX model that it was built from")
        if target.options["strip_weights"] and model is not None:
            refit = Path(folder.name) / "weights.onnx"
            refit.write_bytes(model.SerializeToString())
        compatible = target.options["version_compatible"]
        loaded = worker.ask("load", 120, engine=str(file), version_compatible=compatible, refit=str(refit) if refit else None)
        self.tensors: list[dict[str, Any]] = loaded["tensors"]
        self._information: list[dict[str, Any]] = loaded["layers"]
        self._bytes = {"engine_bytes": file.stat().st_size, "device_bytes": int(loaded["device_bytes"])}
        self._example = [x.detach().cpu().contiguous().numpy() for x in example] if example is not None else self._random()
        self._modules = _modules_of(model)
        types = _engine_types(self._information)
        if types and model is not None:  # what the builder really chose, the flags of old releases included
            _check_types(types, target.precision)

    def _random(self) -> Arrays:
        """Inputs of the target's batch, for an engine that came as a file."""
        random = np.random.default_rng(0)
        shapes = [(self._target.batch, *tensor["profile"][1][1:]) for tensor in self.tensors if tensor["input"]]
        return [random.standard_normal(shape).astype(np.float32) for shape in shapes]

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> Arrays:
        """Outputs in the order of the model's outputs."""
        found = self._worker.ask("run", 120, inputs=self._files(inputs), folder=self._folder.name)
        return [np.fromfile(o["path"], dtype=o["dtype"]).reshape(o["shape"]) for o in found["outputs"]]

    def timer(self) -> Timer:
        """Time between two events around replays of a CUDA graph."""
        self._worker.ask("prepare", 120, inputs=self._files(self._example, "timed"), cuda_graph=self._target.options["cuda_graph"])

        def timer(count: int) -> Sample:
            found = self._worker.ask("time", 120, count=count)
            return Sample(found["gpu_s"], found["gpu_s"], False, host_s=found["host_s"], enqueue_s=found["enqueue_s"])

        return timer

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """Time per layer from TensorRT's profiler, which adds to each: they are not expected to sum to the latency."""
        self._worker.ask("prepare", 120, inputs=self._files(self._example, "timed"), cuda_graph=False)
        found = self._worker.ask("profile", 300, runs=runs)["layers"]
        about = {str(layer.get("Name")): layer for layer in self._information}
        return [self._layer(item, about.get(item["name"], {})) for item in found]

    def _layer(self, item: Mapping[str, Any], about: Mapping[str, Any]) -> LayerTime:
        nodes = [part.strip("[] ").removeprefix("ONNX Layer: ") for part in str(about.get("Metadata", "")).split("\x1e") if part]
        nodes = nodes or re.split(r" \+ | \|\| ", str(item["name"]))  # TensorRT before 8.6 tells them by the name alone
        modules = dict.fromkeys(self._modules.get(node, node) for node in nodes)
        return LayerTime(item["name"], str(about.get("LayerType", "")), float(item["median_ms"]), tuple(modules))

    def memory(self) -> dict[str, int]:
        """Size of the engine file, and the scratch memory of its context."""
        return dict(self._bytes)

    def _files(self, arrays: Sequence[NDArray[np.generic]], purpose: str = "input") -> list[dict[str, object]]:
        if not Path(self._folder.name).is_dir():
            raise BackendError("this engine is closed; build it again")
        names = [tensor for tensor in self.tensors if tensor["input"]]
        if len(names) != len(arrays):
            raise BackendError(f"the engine takes {len(names)} inputs, {len(arrays)} were given")
        files: list[dict[str, object]] = []
        for tensor, array in zip(names, arrays, strict=True):
            _check_shape(tensor, array.shape)
            path = Path(self._folder.name) / f"{purpose}-{len(files)}.bin"
            path.write_bytes(np.ascontiguousarray(array).astype(tensor["dtype"], copy=False).tobytes())
            files.append({"name": tensor["name"], "path": str(path), "shape": list(array.shape)})
        return files

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the process."""
        self._worker.close()
        self._folder.cleanup()


def _check_shape(tensor: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    least, _, most = tensor["profile"]
    if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
        raise BackendError(f"input {tensor['name']} has shape {shape}, the engine was built for {tuple(least)} to {tuple(most)}")


def _modules_of(model: onnx.ModelProto | None) -> dict[str, str]:
    """ONNX node -> PyTorch module, where the exporter noted it."""
    nodes = [] if model is None else model.graph.node
    return {node.name: prop.value for node in nodes for prop in node.metadata_props if prop.key == LAYER}


def _engine_types(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Precision -> number of convolution and matrix layers, from the engine inspector's descriptions of their inputs."""
    counts: dict[str, int] = {}
    for layer in layers:
        kind = f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
        inputs = [tensor for tensor in layer.get("Inputs") or [] if isinstance(tensor, dict)]
        if not inputs or not any(word in kind for word in ("conv", "gemm", "matmul", "matrix")):
            continue
        text = f"{inputs[0].get('Format/Datatype', '')} {inputs[0].get('Datatype', '')}".lower()
        for word, name in (("int8", "int8"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("float", "float32")):
            if word in text:
                counts[name] = counts.get(name, 0) + 1
                break
    return counts
