"""A class for every position: logits (N, classes, H, W) and masks (N, H, W)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compressor.errors import DataError
from compressor.passes.statistics.distances import ClassDivergence
from compressor.passes.statistics.main_output import main_output
from compressor.tasks.metric import Metric, TorchMeter
from compressor.tasks.task import Task
from compressor.tasks.torch_metrics import torch_metrics


def segmentation(classes: int, ignore_index: int | None = None) -> Task:
    """Semantic segmentation: cross-entropy at every position, and mIoU (Jaccard index, averaged over classes) in percent.

    Batches are `(inputs, masks (N, H, W) of whole numbers)`, outputs logits (N, classes, H, W), alone or as `logits`, as `out` or
    as the first of several; smaller logits are scaled up bilinearly to the masks.

    Args:
        classes: How many there are.
        ignore_index: Of positions that do not count.

    Raises:
        DataError: The package `torchmetrics` is not there.
    """
    from_package = torch_metrics("segmentation")
    skipped = -100 if ignore_index is None else ignore_index

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(_logits(outputs, batch[1]), batch[1].long(), ignore_index=skipped)

    def pairs(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return _logits(outputs, batch[1]).argmax(1), batch[1].long()

    def meter() -> TorchMeter:
        jaccard = from_package.JaccardIndex(task="multiclass", num_classes=classes, ignore_index=ignore_index)
        return TorchMeter(jaccard, pairs, 100.0)

    return Task(loss, Metric("mIoU", "%", meter=meter), compare=ClassDivergence(), name="segmentation")


def _logits(outputs: Any, masks: Tensor) -> Tensor:
    """Of the size of the masks."""
    logits = main_output(outputs)
    if logits.dim() != 4 or masks.dim() != 3:
        found = f"{tuple(logits.shape)} and {tuple(masks.shape)}"
        raise DataError(f"segmentation needs logits (N, classes, H, W) and masks (N, H, W), found {found}")
    if logits.shape[2:] == masks.shape[1:]:
        return logits
    return F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
