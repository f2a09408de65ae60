"""ONNX Runtime on an NVIDIA GPU (`onnxruntime-gpu`).

The search for convolution algorithms is set explicitly and part of the target: the library's default of some
releases was several times slower than `EXHAUSTIVE` or `HEURISTIC`.
"""

import time
from collections.abc import Mapping

from compressor.errors import BackendError
from compressor.runtime.backends.base import Health, LayerTime, Workload
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine, _package
from compressor.runtime.timing.protocol import PROTOCOL
from compressor.runtime.timing.timers import Sample, Timer
from compressor.values.target import Option, Target

_PROVIDER = "CUDAExecutionProvider"


class OnnxRuntimeCuda:
    """Builds `OnnxRuntimeCudaEngine`s."""

    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    options: Mapping[str, Option] = {"conv_search": "EXHAUSTIVE", "tf32": False, "channels_last": False}

    def build(self, workload: Workload, target: Target) -> "OnnxRuntimeCudaEngine":
        """Lower the network and open a session on it; refuses to fall back to the CPU."""
        _need_provider()
        flags = {name: str(int(bool(target.options[name]))) for name in ("tf32", "channels_last")}
        settings = {
            "cudnn_conv_algo_search": str(target.options["conv_search"]),
            "use_tf32": flags["tf32"],
            "prefer_nhwc": flags["channels_last"],
            "cudnn_conv_use_max_workspace": "1",
        }
        model = workload.onnx(target.precision).SerializeToString()
        return OnnxRuntimeCudaEngine(model, workload.example, target, [(_PROVIDER, settings), "CPUExecutionProvider"])

    def fingerprint(self, target: Target) -> dict[str, object]:
        """GPU, driver and versions."""
        del target
        from compressor.runtime.backends.pytorch import gpu

        return {"backend_version": _need_provider(), **gpu(), "protocol": PROTOCOL}

    def check(self) -> Health:
        """Whether the CUDA provider really opens a session."""
        from compressor.runtime.backends.sentinel import sentinel_workload

        try:
            with self.build(sentinel_workload(), Target("onnxruntime-cuda")) as engine:
                engine.timer()(1)
            return Health(True, f"onnxruntime-gpu {_need_provider()}")
        except BackendError as error:
            return Health(False, str(error), "pip install 'fx-compressor[onnxruntime-gpu]' on a machine with an NVIDIA GPU")


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A session on the GPU, its inputs and outputs in GPU memory.

    Raises:
        BackendError: The session would run on the CPU instead.
    """

    device = "cuda"

    def _new_session(self, options: object) -> object:
        session = super()._new_session(options)
        if _PROVIDER not in session.get_providers():
            raise BackendError("ONNX Runtime opened the session on the CPU: its CUDA provider does not load here")
        return session

    def timer(self) -> Timer:
        """Wall time of back-to-back runs, which end when the GPU has finished."""
        session, binding = self._open, self._binding(self._open)

        def timer(count: int) -> Sample:
            begun = time.perf_counter()
            for _ in range(count):
                session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            taken = time.perf_counter() - begun
            return Sample(taken, taken, False, host_s=taken)

        return timer

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """Not told: kernels run on while the profiler's clock, the host's, has stopped."""
        del runs
        return []


def _need_provider() -> str:
    ort = _package()
    if _PROVIDER not in ort.get_available_providers():
        raise BackendError("the installed onnxruntime has no CUDA provider: pip uninstall onnxruntime; pip install onnxruntime-gpu")
    return str(ort.__version__)
