"""Shared by all tests: torchvision beside a CPU build of torch, one thread per worker, one seed."""

import os
import tempfile

import pytest
import torch

from tools import torchvision_ops

torchvision_ops.declare()
os.environ["COMPRESSOR_CACHE"] = tempfile.mkdtemp(prefix="compressor-tests-")  # not the user's; child processes inherit it


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)
