"""Graph in, engine and measured numbers out: one back end per file, one line each in `BACKENDS`."""

from collections.abc import Callable

from compressor.runtime.base import Backend, Engine, Workload
from compressor.runtime.fake import Fake
from compressor.runtime.onnxruntime import OnnxRuntime
from compressor.runtime.onnxruntime_cuda import OnnxRuntimeCuda
from compressor.runtime.pytorch import PyTorch
from compressor.runtime.tensorrt import TensorRT, TensorRTRTX

BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxruntime": OnnxRuntime,
    "onnxruntime-cuda": OnnxRuntimeCuda,
    "torch": PyTorch,
    "tensorrt": TensorRT,
    "tensorrt-rtx": TensorRTRTX,
    "fake": Fake,
}

__all__ = ["BACKENDS", "Backend", "Engine", "Workload"]
