"""Shared by all tests: torchvision beside a CPU build of torch, one thread per worker, one seed."""

import os
import tempfile

import pytest
import torch

from tools import torchvision_ops

torchvision_ops.declare()
torch.set_num_threads(1)  # now: fixtures of modules run before those of functions, and sums depend on the threads
_CACHE = tempfile.TemporaryDirectory(prefix="compressor-tests-", ignore_cleanup_errors=True)
os.environ["COMPRESSOR_CACHE"] = _CACHE.name  # not the user's; child processes inherit it


def pytest_unconfigure():
    """Each worker has a cache of its own, and leaves nothing behind."""
    _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)
