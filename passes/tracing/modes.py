"""Modes of a model and of the device, for a while: eval mode, buffers as they were, and float32 with all its bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again outside."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside: on a GPU cuDNN computes float32 convolutions with 10 bits of mantissa by default.

    What is compared with a float32 tolerance, or solved in closed form, needs all 23.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode, and every buffer's own values, again outside."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
        for module, training in modes.items():
            module.training = training
