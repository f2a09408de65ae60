"""Find a user's model or data by `package.module:callable` or `file.py:callable`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from compressor.data.onnx_models import from_onnx
from compressor.errors import DataError
from compressor.values.files import load_weights


def load_callable(name: str) -> Callable[[], Any]:
    """The callable that a text names.

    Raises:
        DataError: No such file, module or callable, or the module fails on import; it is said which.
    """
    source, separator, attribute = name.rpartition(":")
    if not separator or not source or not attribute:
        raise DataError(f"{name!r}: write package.module:callable or file.py:callable")
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise DataError(f"{source} has no `{attribute}`; it offers {', '.join(offered[:8]) or 'nothing callable'}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{name} is not callable, it is {type(found).__name__}")
    return cast(Callable[[], Any], found)


def called(name: str) -> Any:
    """What the callable that a text names returns.

    Raises:
        DataError: There is no such callable, or it fails.
    """
    call = load_callable(name)
    try:
        return call()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise DataError(f"{name}() failed: {type(error).__name__}: {line}") from error


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """Build a model by name and load its weights.

    Args:
        name: `package.module:callable` or `file.py:callable`, which is called without arguments and returns a module; or an
            ONNX file.
        weights: Safetensors, or a `.pt` file of tensors and plain data: a `state_dict`, or a checkpoint that holds one somewhere.

    Raises:
        DataError: There is no such callable, it fails, it returns no module, or the weights do not fit.
    """
    model = from_onnx(name) if name.endswith(".onnx") else called(name)
    if not isinstance(model, nn.Module):
        raise DataError(f"{name}() must return a torch.nn.Module, it returned {type(model).__name__}")
    if weights is not None:
        said = load_weights(model, weights)
        if said:
            print(f"weights: {said}", file=sys.stderr)
    return model.eval()


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that the file finds its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{path} fails on import: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(f"no such module: {name} ({error})") from error
    except Exception as error:
        raise DataError(f"{name} fails on import: {type(error).__name__}: {error}") from error
