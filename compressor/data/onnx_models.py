"""Models that come as an ONNX file, by the package `onnx2torch`."""

import contextlib
import io
import warnings
from pathlib import Path

from torch import nn

from compressor.errors import DataError
from compressor.runtime.onnx.read import load_onnx


def from_onnx(path: str | Path) -> nn.Module:
    """A model from an ONNX file, in eval mode; to be traced, analyzed and compressed like any other.

    Args:
        path: The file. Weights are its initializers; nothing of it runs code.

    Raises:
        DataError: The file cannot be read, holds an op that the converter does not know, or `onnx2torch` is not there.
    """
    path = Path(path)
    proto = load_onnx(path)
    try:
        from onnx2torch import convert
    except (ImportError, RuntimeError) as error:  # a torchvision of another build than torch raises the latter
        raise DataError(f"models from ONNX need the package onnx2torch: pip install 'fx-compressor[onnx]' ({error})") from error
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            model: nn.Module = convert(proto)
    except NotImplementedError as error:
        raise DataError(f"{path}: {_first_line(error)}; pass the PyTorch model that it was exported from") from error
    except Exception as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(
            f"{path}: onnx2torch cannot convert it ({said}); pass the PyTorch model that it was exported from"
        ) from error
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
