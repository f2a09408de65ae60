"""One back end per file, one line each in `BACKENDS`: graph in, engine out.

Imports `compressor.values`, `compressor.passes`, `runtime.onnx` and `runtime.timing`.
"""

from collections.abc import Callable

from compressor.runtime.backends.base import Backend, Engine, Workload
from compressor.runtime.backends.fake import Fake
from compressor.runtime.backends.onnxruntime import OnnxRuntime
from compressor.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from compressor.runtime.backends.pytorch import PyTorch
from compressor.runtime.backends.tensorrt import TensorRT, TensorRTRTX
from compressor.values.target import make_known

BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxruntime": OnnxRuntime,
    "onnxruntime-cuda": OnnxRuntimeCuda,
    "torch": PyTorch,
    "tensorrt": TensorRT,
    "tensorrt-rtx": TensorRTRTX,
    "fake": Fake,
}

make_known(BACKENDS)

__all__ = ["BACKENDS", "Backend", "Engine", "Workload"]
