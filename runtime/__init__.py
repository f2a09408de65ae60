"""Graph in, engine and measured numbers out: one back end per file, one line each in `BACKENDS`."""

from collections.abc import Callable

from compressor.runtime.base import Backend, Engine
from compressor.runtime.fake import Fake
from compressor.runtime.onnxruntime import OnnxRuntime

BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxruntime": OnnxRuntime,
    "fake": Fake,
}

__all__ = ["BACKENDS", "Backend", "Engine"]
