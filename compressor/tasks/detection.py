"""Boxes: a detector's own loss, and mean average precision."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from compressor.passes.statistics.distances import SquaredError
from compressor.tasks.metric import Metric, TorchMeter
from compressor.tasks.task import Task, first_of
from compressor.tasks.torch_metrics import torch_metrics


def detection(
    loss: Callable[[Any, Any], Tensor],
    predictions: Callable[[Any], Sequence[dict[str, Tensor]]],
    targets: Callable[[Any], Sequence[dict[str, Tensor]]],
    inputs: Callable[[Any], Any] = first_of,
) -> Task:
    """Object detection: the detector's own loss, and mAP over IoU 0.50 to 0.95 in percent, as COCO counts it.

    Args:
        loss: `loss(outputs, batch)`, as the detector is trained by.
        predictions: From the network's outputs, for every image `boxes` (n, 4) as x1 y1 x2 y2 in pixels, `scores` (n,) and
            `labels` (n,).
        targets: From a batch, for every image `boxes` and `labels`.
        inputs: The images of a batch.

    Raises:
        DataError: The package `torchmetrics` is not there, or none that it counts by.
    """
    from_package = torch_metrics("detection")

    def pairs(outputs: Any, batch: Any) -> tuple[Any, Any]:
        return list(predictions(outputs)), list(targets(batch))

    def meter() -> TorchMeter:
        return TorchMeter(from_package.detection.MeanAveragePrecision(), pairs, 100.0, "map")

    return Task(loss, Metric("mAP50-95", "%", meter=meter), inputs, SquaredError(), "detection", rows=False)
