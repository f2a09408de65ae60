"""Import torchvision beside a build of torch that it was not made for.

A torchvision built for CUDA fails to import beside a CPU torch (`operator torchvision::nms does not exist`),
although the models need none of its compiled ops. Declaring the schemas first lets it import.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import torch

_LIBRARIES: list[torch.library.Library] = []  # a library's schemas live as long as it does


def declare() -> None:
    """Declare the ops that torchvision's import asks for; nothing where its own extension has them or it is not there."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _LIBRARIES or _imports():
        return
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    names = set(re.findall(r'register_meta\("([^"]+)"\)', text)) | set(re.findall(r"torchvision::(\w+)", text))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARIES.append(library)


def _imports() -> bool:
    """Whether torchvision imports as it is; a failed attempt leaves no trace."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True
