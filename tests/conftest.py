"""Shared by all tests: torchvision beside a CPU build of torch, tiny networks, one thread per worker."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

_LIBRARIES = []  # a library's schemas live as long as it does


def declare_torchvision_ops() -> None:
    """Declare the ops of a torchvision built for CUDA, which its import asks for and a CPU torch lacks."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _LIBRARIES:
        return
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    names = set(re.findall(r'register_meta\("([^"]+)"\)', text)) | set(re.findall(r"torchvision::(\w+)", text))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARIES.append(library)


declare_torchvision_ops()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)
