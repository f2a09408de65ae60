"""Several labels at once: logits (N, labels) and targets (N, labels) of zeros and ones."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compressor.passes.statistics.distances import SquaredError
from compressor.passes.statistics.main_output import main_output
from compressor.tasks.metric import Metric, TorchMeter
from compressor.tasks.task import Task
from compressor.tasks.torch_metrics import torch_metrics


def multi_label(labels: int) -> Task:
    """Labels that do not exclude each other: binary cross-entropy, and mean average precision over labels in percent.

    Batches are `(inputs, targets (N, labels) of zeros and ones)`, outputs logits (N, labels).

    Args:
        labels: How many there are.

    Raises:
        DataError: The package `torchmetrics` is not there.
    """
    from_package = torch_metrics("multi_label")

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(main_output(outputs), batch[1].float())

    def pairs(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return main_output(outputs).sigmoid(), batch[1].long()

    def meter() -> TorchMeter:
        return TorchMeter(from_package.AveragePrecision(task="multilabel", num_labels=labels), pairs, 100.0)

    return Task(loss, Metric("mAP", "%", meter=meter), compare=SquaredError(), name="multi-label")
