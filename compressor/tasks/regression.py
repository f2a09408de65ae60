"""Numbers: outputs and targets of one shape."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compressor.errors import DataError
from compressor.passes.statistics.distances import SquaredError
from compressor.passes.statistics.main_output import main_output
from compressor.tasks.metric import Metric
from compressor.tasks.task import Task


def regression() -> Task:
    """Numbers: squared error, and the root of its mean (RMSE), of which less is better.

    Batches are `(inputs, targets)`, the targets of the shape of the first output.
    """

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.mse_loss(*pair_of_one_shape(outputs, batch[1]))

    return Task(loss, Metric("RMSE", higher_is_better=False, meter=_RootOfMean), compare=SquaredError(), name="regression")


def pair_of_one_shape(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first output and its targets.

    Raises:
        DataError: Their shapes differ, which would be broadcast.
    """
    first = main_output(outputs)
    if first.shape != targets.shape:
        raise DataError(f"outputs and targets must be of one shape, found {tuple(first.shape)} and {tuple(targets.shape)}")
    return first, targets.to(first.dtype)


class _RootOfMean:
    def __init__(self) -> None:
        self._squares, self._count = 0.0, 0

    def update(self, outputs: Any, batch: Any) -> None:
        found, wanted = pair_of_one_shape(outputs, batch[1])
        self._squares += float((found.double() - wanted.double()).square().sum())
        self._count += wanted.numel()

    def compute(self) -> float:
        return float((self._squares / self._count) ** 0.5)
