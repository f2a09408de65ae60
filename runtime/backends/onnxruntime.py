"""ONNX Runtime on the CPU: the default back end, present everywhere."""

import contextlib
import json
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import BackendError
from compressor.runtime.backends.base import Arrays, Health, LayerTime, Workload
from compressor.runtime.onnx.export import LAYER
from compressor.runtime.onnx.precision import Int8
from compressor.runtime.timing.protocol import PROTOCOL
from compressor.runtime.timing.timers import Timer, process_timer
from compressor.values.target import Option, Target


class OnnxRuntime:
    """Builds `OnnxRuntimeEngine`s."""

    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    options: Mapping[str, Option] = {}

    def build(self, workload: Workload, target: Target) -> "OnnxRuntimeEngine":
        """Lower the network and open a session on it."""
        return OnnxRuntimeEngine(workload.onnx(target.precision, int8_form()).SerializeToString(), workload.example, target)

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Processor, versions and session settings."""
        ort = _package()
        quantized = {"int8": asdict(int8_form())} if target.precision == "int8" else {}
        return {
            **quantized,
            "backend_version": ort.__version__,
            "device": processor(),
            "system": f"{platform.system()} {platform.release()}",
            "spinning": False,
            "protocol": PROTOCOL,
        }

    def check(self) -> Health:
        """Whether the package is there."""
        try:
            return Health(True, f"onnxruntime {_package().__version__} on {processor()}")
        except BackendError as error:
            return Health(False, str(error), "pip install onnxruntime")


class OnnxRuntimeEngine:
    """A session on one thread pool, spinning off, inputs and outputs bound.

    Args:
        model: Serialized ONNX model, or the path of one.
        example: Inputs that timing runs on.
        target: Its threads are used.
        providers: Execution providers with their options.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the model.
    """

    device = "cpu"

    def __init__(
        self,
        model: bytes | Path,
        example: Sequence[Tensor],
        target: Target,
        providers: Sequence[object] = ("CPUExecutionProvider",),
    ) -> None:
        self._ort = _package()
        self._model = model
        self._providers = list(providers)
        self._threads = target.threads
        self._session: Any = self._new_session(self._options())
        self._example = [x.detach().cpu().contiguous().numpy() for x in example]

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Threads that spin while another session runs multiply its latency.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _new_session(self, options: Any) -> Any:
        try:
            # A path stays a path: weights in files beside it are found from there.
            source = str(self._model) if isinstance(self._model, Path) else self._model
            return self._ort.InferenceSession(source, options, providers=self._providers)
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from error

    @property
    def _open(self) -> Any:
        if self._session is None:
            raise BackendError("this engine is closed; build it again")
        return self._session

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> Arrays:
        """Outputs in the order of the model's outputs."""
        names = [item.name for item in self._open.get_inputs()]
        if len(names) != len(inputs):
            raise BackendError(f"the engine takes {len(names)} inputs ({', '.join(names)}), {len(inputs)} were given")
        try:
            outputs: Arrays = self._open.run(None, dict(zip(names, inputs, strict=True)))
        except Exception as error:  # the package's errors have no common class
            raise BackendError(f"ONNX Runtime cannot run the model: {str(error).splitlines()[0]}") from error
        return outputs

    def timer(self) -> Timer:
        """Times runs with bound inputs and outputs, so that no copy to Python is in the way."""
        session, binding = self._open, self._binding(self._open)
        return process_timer(lambda: session.run_with_iobinding(binding), self._threads)

    def _binding(self, session: Any) -> Any:
        binding = session.io_binding()
        for item, value in zip(session.get_inputs(), self._example, strict=True):
            binding.bind_ortvalue_input(item.name, self._ort.OrtValue.ortvalue_from_numpy(value, self.device, 0))
        for item in session.get_outputs():
            binding.bind_output(item.name, self.device, 0)
        return binding

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """Time per node of the optimized graph, from a session of its own with profiling on."""
        with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._new_session(options)
            binding = self._binding(session)
            for _ in range(runs + 5):
                session.run_with_iobinding(binding)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times, kinds = defaultdict(list), {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                times[name].append(event["dur"] / 1e3)
                kinds[name] = event["args"].get("op_name", "")
        owners = _owners(self._model)
        return [LayerTime(n, kinds[n], statistics.median(t[5:] or t), owners(n)) for n, t in times.items()]

    def memory(self) -> dict[str, int]:
        """Size of the ONNX model."""
        return {"engine_bytes": self._model.stat().st_size if isinstance(self._model, Path) else len(self._model)}

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the session."""
        self._session = None


class _owners:  # noqa: N801 - used as a function
    """PyTorch modules of a node of the optimized graph.

    ONNX Runtime names a fused node after the last node or tensor that it stands for: `relu_1_nchwc` is the
    convolution and the ReLU that end in the tensor `relu_1`. So from there it goes back to the nearest layer.
    """

    def __init__(self, model: bytes | Path) -> None:
        loaded = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.load_from_string(model)
        self._nodes = loaded.graph.node
        self._makers = {output: node for node in self._nodes for output in node.output}
        self._named = {**self._makers, **{node.name: node for node in self._nodes if node.name}}

    def __call__(self, name: str) -> tuple[str, ...]:
        name = name.removeprefix("InsertedPrecisionFreeCast_")  # FP16 that ONNX Runtime computes in FP32
        found = next((self._named[n] for n in sorted(self._named, key=len, reverse=True) if name.startswith(n)), None)
        modules: list[str] = []
        for _ in range(4):  # convolution, norm, activation, addition
            if found is None:
                break
            module = next((p.value for p in found.metadata_props if p.key == LAYER), None)
            if module is not None and module not in modules:
                modules.insert(0, module)
            if found.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                break
            found = next((self._makers[i] for i in found.input if i in self._makers), None)
        return tuple(modules)


def int8_form() -> Int8:
    """The INT8 that is fast and exact on this processor: unsigned activations, 7-bit weights where products saturate."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return Int8("uint8", 8)
    with contextlib.suppress(OSError):
        return Int8("uint8", 8 if "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else 7)
    return Int8("uint8", 7)


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("the back end `onnxruntime` needs the package onnxruntime: pip install onnxruntime") from error
    return onnxruntime


def processor() -> str:
    """Model of the processor and number of cores."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x{os.cpu_count()}"
    return f"{platform.machine()} x{os.cpu_count()}"
