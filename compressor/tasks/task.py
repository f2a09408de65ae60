"""`Task`: what a network is for, as a value: what of a batch it reads, how wrong its outputs are, and how good it is.

task = Task(
loss=lambda outputs, batch: F.mse_loss(outputs, batch["clean"]),
metric=torchmetrics.image.PeakSignalNoiseRatio(data_range=1.0),
inputs=lambda batch: batch["noisy"],
)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.statistics.distances import Distance, OwnDistance, default_distance
from compressor.tasks.calling import called, described
from compressor.tasks.metric import Metric
from compressor.tasks.telling import told
from compressor.values.plan import digest_of


def first_of(batch: Any) -> Any:
    """The inputs of a batch: it itself, or the first part of a tuple or list."""
    return batch[0] if isinstance(batch, list | tuple) and batch else batch


def _as_it_is(batch: Any, k: int) -> Any:
    del k
    return batch


class NotFiniteError(DataError):
    """A loss that is infinite or no number."""


@dataclass(frozen=True)
class Task:
    """What a network is for.

    Attributes:
        loss: `loss(outputs, batch) -> Tensor`: the mean over the samples of a batch. `outputs` are the network's, as nested as it
            gives them; `batch` is as the loader gives it, on the network's device.
        metric: A `Metric`; a metric of torchmetrics, which is given `(outputs, batch[1])`; or a function
            `metric(model, batches) -> float`.
        inputs: `inputs(batch)`: a tensor, or a tuple, list or dict of them where the network has several inputs; the first part
            of the batch by default.
        compare: `compare(outputs, wanted) -> Tensor`: how far outputs are from the original's, for distillation and
            sensitivities. By default the divergence of class probabilities for logits (N, classes), and else the squared
            error of all outputs of floating point as a share of their squares.
        name: In messages and results.
        rows: Whether batches may be cut, where every tensor in them has a row per sample.
        checked: `checked(batch, k)`: the k-th batch of a loader once it was looked at, for tasks that know what it has to be.

    Raises:
        DataError: The metric is none of these.
    """

    loss: Callable[[Any, Any], Tensor]
    metric: Metric
    inputs: Callable[[Any], Any] = first_of
    compare: Distance | Callable[[Any, Any], Tensor] | None = None
    name: str = "own"
    rows: bool = True
    checked: Callable[[Any, int], Any] = field(default=_as_it_is, repr=False)

    def __post_init__(self) -> None:
        """Let a metric be written as people have it."""
        object.__setattr__(self, "metric", Metric.of(self.metric))

    def distance(self, network: fx.GraphModule | Any) -> Distance:
        """How the outputs of a network are compared; by what they look like, where the task does not say.

        Args:
            network: The graph, or outputs that it gave.
        """
        if self.compare is None:
            return default_distance(network)
        return self.compare if isinstance(self.compare, Distance) else OwnDistance(self.compare)

    def inputs_of(self, batch: Any, names: Sequence[str] = (), k: int = 0) -> tuple[Tensor, ...]:
        """The network's inputs of a batch.

        Args:
            batch: As the loader gives it.
            names: Of the network's inputs: a dict of inputs is put in their order, what is not among them is left out.
            k: Number of the batch.

        Raises:
            DataError: There are none in it.
        """
        found = called("the task's inputs(batch)", self.inputs, batch)
        if isinstance(found, Mapping):
            missing = [name for name in names if name not in found]
            if missing:
                raise DataError(f"batch {k}: the network's input `{missing[0]}` is not in it, found {described(found)}")
            found = tuple(found[name] for name in names) or tuple(found.values())
        found = tuple(found) if isinstance(found, list | tuple) else (found,)
        if not found or not all(isinstance(x, Tensor) and x.dim() for x in found):
            said = described(found if len(found) != 1 else found[0])
            raise DataError(
                f"batch {k}: the inputs must be a tensor (N, …) or several, found {said} in {described(batch)}: "
                "say where they are by Task(inputs=lambda batch: …)"
            )
        return found

    def loss_of(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of a batch, checked.

        Raises:
            DataError: It is no single number as a tensor, or not finite.
        """
        found = called("the task's loss(outputs, batch)", self.loss, outputs, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise DataError(f"the task's loss(outputs, batch) must return one number as a tensor, it returned {described(found)}")
        if not bool(torch.isfinite(found.detach()).all()):
            raise NotFiniteError(f"the loss is not finite ({float(found.detach()):g})")
        return found.reshape(())

    def to_dict(self) -> dict[str, object]:
        """What can be said of it as plain data, so that a run tells it from another task."""
        functions = [self.loss, self.inputs, self.compare, self.metric.whole, self.metric.meter]
        return {"name": self.name, "metric": self.metric.to_dict(), "functions": digest_of(told(functions))[:12]}
