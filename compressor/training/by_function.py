"""Training by the user's own means: a function that is given the network and what is known about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import device_of
from compressor.tasks.calling import called
from compressor.tasks.samples import Samples
from compressor.tasks.task import Task
from compressor.tasks.telling import told
from compressor.training.fine_tune import FineTune
from compressor.training.mimic import Mimic
from compressor.values.files import check_finite, digest_of_tensors
from compressor.values.plan import digest_of
from compressor.values.progress import Progress


@dataclass(frozen=True)
class Context:
    """What a training function is given beside the network.

    Attributes:
        original: The traced original, in eval mode; a teacher.
        task: What the network is judged by.
        train: The training batches, or None.
        validate: The hold-out.
        folder: For checkpoints; what lies there after a kill is there again. Nothing in it is part of the result.
        seed: Of everything random.
        progress: Where to say how far it is.
    """

    original: fx.GraphModule
    task: Task
    train: Samples | None
    validate: Samples
    folder: Path
    seed: int
    progress: Progress


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that was trained elsewhere.

    Attributes:
        state: Its `state_dict`.
    """

    state: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, object]:
        """What tells it from others."""
        return {"trained": digest_of_tensors(self.state)}


Recovery: TypeAlias = FineTune | Mimic | Trained | Callable[[fx.GraphModule, Context], None]
"""How a network is trained after it was compressed."""


def train_by(function: Callable[[fx.GraphModule, Context], None], graph: fx.GraphModule, context: Context) -> None:
    """Let a function train a network in place.

    Raises:
        DataError: It fails, gives the network another structure, or leaves weights that are no numbers.
    """
    before, device = {name: (tensor.shape, tensor.dtype) for name, tensor in graph.state_dict().items()}, device_of(graph)
    with eval_mode(graph), torch.enable_grad():
        graph.requires_grad_(True)
        called("finetune(model, context)", function, graph.train(), context)
    graph.to(device)
    after = {name: (tensor.shape, tensor.dtype) for name, tensor in graph.state_dict().items()}
    if before != after:
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise DataError(f"finetune(model, context) changed the network's structure at `{changed[0]}`; it may only change values")
    check_finite(graph.state_dict(), "the network that finetune(model, context) left")


def described(recovery: Recovery) -> dict[str, object]:
    """The settings as plain data; a function by its name."""
    if isinstance(recovery, FineTune | Mimic | Trained):
        return recovery.to_dict()
    return {"function": digest_of(told(recovery))[:12]}
