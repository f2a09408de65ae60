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
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import onnx

from compressor.errors import BackendError
from compressor.runtime.backends.base import Health, Workload
from compressor.runtime.backends.tensorrt_engine import TensorRTEngine, check_types
from compressor.runtime.backends.worker_process import Progress, WorkerProcess
from compressor.runtime.onnx.precision import Int8
from compressor.runtime.timing.protocol import PROTOCOL
from compressor.values.files import cache_folder
from compressor.values.target import Option, Target

WORKER = Path(__file__).with_name("tensorrt_worker.py")
INTERPRETER = "COMPRESSOR_TENSORRT_PYTHON"
_OLD_OPSET = 17  # the newest that TensorRT 8 parses
_AS_IT_IS = "compressor.as_it_is"  # a domain whose nodes ONNX's converter leaves alone


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

    def build(self, workload: Workload, target: Target) -> TensorRTEngine:
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

    def load(self, file: Path, target: Target, model: onnx.ModelProto | None = None) -> TensorRTEngine:
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
            check_types(found["network_types"], target.precision)
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
    """A model at the newest opset that TensorRT 8 parses.

    Raises:
        BackendError: ONNX's converter does not know how.
    """
    if model.opset_import[0].version <= _OLD_OPSET:
        return model
    hidden = onnx.ModelProto()
    hidden.CopyFrom(model)
    for node in hidden.graph.node:  # the converter refuses every Pad; without its fourth input, of axes, it is that of opset 13
        if node.op_type == "Pad" and len(node.input) < 4:
            node.domain = _AS_IT_IS
    hidden.opset_import.append(onnx.helper.make_opsetid(_AS_IT_IS, 1))
    try:
        older = onnx.version_converter.convert_version(hidden, _OLD_OPSET)
    except RuntimeError as error:
        raise BackendError(f"the network cannot be written at opset {_OLD_OPSET}, which TensorRT 8 needs: {error}") from error
    imports = [item for item in older.opset_import if item.domain != _AS_IT_IS]
    del older.opset_import[:]
    older.opset_import.extend(imports)
    for node in older.graph.node:
        node.domain = "" if node.domain == _AS_IT_IS else node.domain
        # the converter leaves an attribute that this opset does not have
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
