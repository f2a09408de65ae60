"""ONNX Runtime on the CPU: the default back end, present everywhere."""

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from compressor.errors import BackendError
from compressor.runtime.onnx_export import to_onnx
from compressor.runtime.timing import PROTOCOL, Timer, process_timer
from compressor.target import Target


class OnnxRuntime:
    """Builds `OnnxRuntimeEngine`s."""

    def build(self, graph: fx.GraphModule, example: Sequence[Tensor], target: Target) -> "OnnxRuntimeEngine":
        """Export the graph and open a session on it."""
        return OnnxRuntimeEngine(to_onnx(graph, example).SerializeToString(), example, target)

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Processor, versions and session settings."""
        ort = _package()
        return {
            "backend": "onnxruntime",
            "backend_version": ort.__version__,
            "device": _processor(),
            "system": f"{platform.system()} {platform.release()}",
            "precision": "fp32",
            "batch": target.batch,
            "threads": target.threads,
            "spinning": False,
            "protocol": PROTOCOL,
        }


class OnnxRuntimeEngine:
    """A session on one thread pool, spinning off, inputs and outputs bound.

    Args:
        model: Serialized ONNX model, or the path of one.
        example: Inputs that timing runs on.
        target: Its threads are used.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the model.
    """

    def __init__(self, model: bytes | Path, example: Sequence[Tensor], target: Target) -> None:
        ort = _package()
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Threads that spin while another session runs multiply its latency.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            source = str(model) if isinstance(model, Path) else model
            self._session: Any = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from error
        self._ort = ort
        self._example = [x.detach().cpu().contiguous().numpy() for x in example]
        self._threads = target.threads

    @property
    def _open(self) -> Any:
        if self._session is None:
            raise BackendError("this engine is closed; build it again")
        return self._session

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """Outputs in the order of the model's outputs."""
        names = [item.name for item in self._open.get_inputs()]
        if len(names) != len(inputs):
            raise BackendError(f"the engine takes {len(names)} inputs ({', '.join(names)}), {len(inputs)} were given")
        outputs: list[NDArray[np.generic]] = self._open.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    def timer(self) -> Timer:
        """Times runs with bound inputs and outputs, so that no copy to Python is in the way."""
        session = self._open
        binding = session.io_binding()
        for item, value in zip(session.get_inputs(), self._example, strict=True):
            binding.bind_ortvalue_input(item.name, self._ort.OrtValue.ortvalue_from_numpy(value))
        for item in session.get_outputs():
            binding.bind_output(item.name, "cpu")
        return process_timer(lambda: session.run_with_iobinding(binding), self._threads)

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the session."""
        self._session = None


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("the back end `onnxruntime` needs the package onnxruntime: pip install onnxruntime") from error
    return onnxruntime


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x{os.cpu_count()}"
    return f"{platform.machine()} x{os.cpu_count()}"
