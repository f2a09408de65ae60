"""What a pass is: a callable on a graph that says truthfully whether it changed it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import fx, nn


class PassResult(NamedTuple):
    """A graph, and whether it differs from the one that went in."""

    graph: fx.GraphModule
    modified: bool


class Pass(Protocol):
    """A rewrite of a traced graph. It takes what it needs in its constructor and leaves its argument alone."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return the rewritten graph; raise `PassError` or `PlanError` with a reason where it refuses."""


class Sequential:
    """Passes one after the other; itself a pass.

    Args:
        passes: In order.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = tuple(passes)

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run them all; modified if any of them was."""
        modified = False
        for one in self._passes:
            gm, changed = one(gm)
            modified = modified or changed
        return PassResult(gm, modified)


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
