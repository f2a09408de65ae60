"""PyTorch itself: eager, `torch.compile`, and on CUDA a captured CUDA graph; on CPU or GPU.

On a GPU the CUDA graph is what a latency means: eager mode mostly measures Python and the driver.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import BackendError
from compressor.passes.tracing.trace import moved, outputs_of, quiet_deepcopy
from compressor.passes.transforms.fold_batchnorm import FoldBatchNorm
from compressor.runtime.backends.base import Arrays, Health, LayerTime, Workload
from compressor.runtime.timing.protocol import PROTOCOL
from compressor.runtime.timing.timers import Sample, Timer, process_timer
from compressor.values.target import Option, Target

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MODES = ("eager", "compile", "cudagraph")


class PyTorch:
    """Builds `PyTorchEngine`s."""

    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16")
    options: Mapping[str, Option] = {"mode": "eager", "device": "cpu", "channels_last": False, "tf32": False}

    def build(self, workload: Workload, target: Target) -> "PyTorchEngine":
        """Copy the graph to the device, at the target's precision."""
        if workload.graph is None:
            raise BackendError("the back end `torch` runs PyTorch models; an ONNX file goes to onnxruntime or tensorrt")
        mode, device = str(target.options["mode"]), str(target.options["device"])
        if mode not in _MODES:
            raise BackendError(f"option `mode` of `torch` is one of {', '.join(_MODES)}; found {mode!r}")
        if device not in ("cpu", "cuda"):
            raise BackendError(
                f"option `device` of `torch` is cpu or cuda (choose a GPU by CUDA_VISIBLE_DEVICES); found {device!r}"
            )
        if device != "cpu" and not torch.cuda.is_available():
            raise BackendError(f"option `device` of `torch` is {device!r}, but this PyTorch sees no GPU ({torch.__version__})")
        if mode == "cudagraph" and device == "cpu":
            raise BackendError("CUDA graphs need a GPU: use the options device=cuda, mode=cudagraph")
        try:
            return PyTorchEngine(workload, target)
        except RuntimeError as error:
            raise BackendError(f"PyTorch cannot run the model at {target.precision}: {str(error).splitlines()[0]}") from error

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Device and versions."""
        from compressor.runtime.backends.onnxruntime import processor

        found: dict[str, object] = {"backend_version": torch.__version__, "protocol": PROTOCOL}
        return {**found, **(gpu() if target.options["device"] != "cpu" else {"device": processor()})}

    def check(self) -> Health:
        """Always there; says whether it sees a GPU."""
        where = str(gpu()["device"]) if torch.cuda.is_available() else "CPU only"
        return Health(True, f"torch {torch.__version__}, {where}")


def gpu() -> dict[str, object]:
    """Name, compute capability, driver and library versions of the first GPU.

    Raises:
        BackendError: PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise BackendError(f"no GPU is visible to PyTorch {torch.__version__}")
    major, minor = torch.cuda.get_device_capability(0)
    found: dict[str, object] = {"device": torch.cuda.get_device_name(0), "cc": f"{major}.{minor}", "cuda": torch.version.cuda}
    found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    with contextlib.suppress(Exception):  # NVML is optional
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else str(driver)
    return found


class PyTorchEngine:
    """A copy of the graph, batch norms folded, on its device; inputs and outputs are float32 on the host."""

    def __init__(self, workload: Workload, target: Target) -> None:
        assert workload.graph is not None
        self._target, self._device = target, torch.device(str(target.options["device"]))
        self._dtype = _DTYPES[target.precision]
        self._on_gpu = self._device.type == "cuda"
        graph = quiet_deepcopy(FoldBatchNorm()(workload.graph).graph).eval().requires_grad_(False)
        self._graph: Any = moved(graph, self._device, self._dtype)
        if target.options["channels_last"]:
            for tensor in (*graph.parameters(), *graph.buffers()):
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        self._bytes = sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))
        self._call: Any = self._graph
        if target.options["mode"] == "compile":
            self._call = torch.compile(self._graph, mode="max-autotune-no-cudagraphs" if self._on_gpu else "default")
        self._example = [self._put(x) for x in workload.example]
        self._forward(self._example)  # compiles, and finds out whether the precision is possible

    def _put(self, x: Tensor) -> Tensor:
        dtype = self._dtype if x.is_floating_point() else x.dtype
        moved = x.detach().to(device=self._device, dtype=dtype)
        channels_last = x.dim() == 4 and self._target.options["channels_last"]
        return moved.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _forward(self, inputs: Sequence[Tensor]) -> Any:
        with torch.inference_mode(), self._settings():
            return self._call(*inputs)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Threads and TF32 are global in PyTorch: set for the run, and put back."""
        threads = torch.get_num_threads()
        allowed = torch.backends.cuda.matmul.allow_tf32
        tf32 = bool(self._target.options["tf32"])
        torch.set_num_threads(self._target.threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
                yield
        finally:
            torch.set_num_threads(threads)
            torch.backends.cuda.matmul.allow_tf32 = allowed

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> Arrays:
        """Outputs in the order of the model's outputs."""
        if self._call is None:
            raise BackendError("this engine is closed; build it again")
        found = outputs_of(self._forward([self._put(torch.from_numpy(np.array(x))) for x in inputs]))
        return [(x.float() if x.is_floating_point() else x).cpu().numpy() for x in found]

    def timer(self) -> Timer:
        """On a CPU wall time of this process; on a GPU time between two events."""
        if not self._on_gpu:
            call, inputs = self._call, self._example
            timer = process_timer(lambda: call(*inputs), self._target.threads)

            def on_cpu(count: int) -> Sample:
                with torch.inference_mode(), self._settings():
                    return timer(count)

            return on_cpu
        launch = self._captured() if self._target.options["mode"] == "cudagraph" else lambda: self._call(*self._example)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def on_gpu(count: int) -> Sample:
            with torch.inference_mode(), self._settings():
                begun = time.perf_counter()
                start.record()
                for _ in range(count):
                    launch()
                end.record()
                enqueued = time.perf_counter()
                end.synchronize()
            gpu_s = start.elapsed_time(end) / 1e3
            return Sample(gpu_s, gpu_s, False, host_s=time.perf_counter() - begun, enqueue_s=enqueued - begun)

        return on_gpu

    def _captured(self) -> Any:
        """Replays a CUDA graph of one run."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its algorithms before the capture
                self._forward(self._example)
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.inference_mode(), self._settings(), torch.cuda.graph(captured):
            self._outputs = self._call(*self._example)
        return captured.replay

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """Not told: ops of eager mode do not add up to anything that is built."""
        del runs
        return []

    def memory(self) -> dict[str, int]:
        """Bytes of the weights; on a GPU also what the allocator has reserved."""
        extra = {"device_bytes": torch.cuda.memory_reserved(self._device)} if self._on_gpu else {}
        return {"engine_bytes": self._bytes, **extra}

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of the copy."""
        self._graph = self._call = None
        self._example = []
        self._outputs = cast(Any, None)
        if self._on_gpu:
            torch.cuda.empty_cache()
