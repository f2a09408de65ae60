"""Classes: logits (N, classes) and labels (N,)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import DataError
from compressor.passes.statistics.distances import ClassDivergence
from compressor.passes.statistics.main_output import main_output
from compressor.tasks.calling import described
from compressor.tasks.metric import Metric
from compressor.tasks.task import Task


def classification(label_smoothing: float = 0.0) -> Task:
    """One class per input: cross-entropy, and the share of inputs whose largest output is the label.

    Batches are `(inputs, labels (N,))`, outputs logits (N, classes), alone or as `logits` or as the first of several.

    Args:
        label_smoothing: Of the cross-entropy, 0 to 1.

    Raises:
        DataError: It is out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise DataError(f"label_smoothing must be at least 0 and less than 1, found {label_smoothing}")
    return Task(
        loss=_cross_entropy(label_smoothing),
        metric=Metric("accuracy", "%", meter=RightAnswers),
        compare=ClassDivergence(),
        name="classification",
        checked=pair_of,
    )


def _cross_entropy(label_smoothing: float) -> Callable[[Any, Any], Tensor]:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(logits_of(outputs, batch[1]), batch[1], label_smoothing=label_smoothing)

    return loss


class RightAnswers:
    """Share of samples whose largest output is the label, in percent."""

    def __init__(self) -> None:
        self.right = self.count = 0

    def update(self, outputs: Any, batch: Any) -> None:
        """See `Meter`."""
        labels = batch[1]
        self.right += int((logits_of(outputs, labels).argmax(1) == labels).sum())
        self.count += len(labels)

    def compute(self) -> float:
        """See `Meter`."""
        return 100.0 * self.right / self.count

    def so_far(self) -> str:
        """For those who wait."""
        return f"accuracy {self.compute():.2f} %"


def logits_of(outputs: Any, labels: Tensor) -> Tensor:
    """A classifier's outputs, checked against the labels.

    Raises:
        DataError: They are no logits for as many labels, or some label is none of the classes.
    """
    logits = main_output(outputs)
    if logits.dim() != 2 or len(logits) != len(labels):
        raise DataError(f"accuracy needs logits (N, classes) for {len(labels)} labels, the model gave {_shown(outputs)}")
    if logits.shape[1] < 2:
        raise DataError(f"a classifier gives logits (N, classes) of two classes or more, found {tuple(logits.shape)}")
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if not 0 <= low <= high < logits.shape[1]:
        raise DataError(
            f"labels go from {low} to {high}, but the model tells {logits.shape[1]} classes apart (0 to {logits.shape[1] - 1})"
        )
    return logits


def pair_of(batch: object, index: int) -> tuple[Tensor, Tensor]:
    """A batch as `(inputs, labels)`, the labels as int64.

    Raises:
        DataError: It is something else, the labels are no whole numbers, or not one for each input.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor) and _tensors(batch[0])):
        raise DataError(
            f"batch {index} must be a pair (inputs, labels) of tensors, found {_described(batch)}; of other data say what "
            "they are for: task=…"
        )
    x, y = batch
    first = x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, Mapping) else x))
    if y.dim() != 1 or first.dim() == 0 or len(first) != len(y):
        advice = "; of one-hot labels pass y.argmax(1)" if y.dim() == 2 else ""
        advice += "; is it no classifier, say what it is for: task=…" if y.dim() != 1 else ""
        shapes = f"{tuple(y.shape)} for {tuple(first.shape)}"
        raise DataError(f"batch {index}: labels must be (N,), one per input, found {shapes}{advice}")
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype is torch.bool:
        raise DataError(f"batch {index}: labels must be whole numbers, found {str(y.dtype).removeprefix('torch.')}")
    return x, y.long()


def _tensors(x: object) -> bool:
    parts = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, list | tuple) else [x]
    return bool(parts) and all(isinstance(part, Tensor) for part in parts)


def _shown(outputs: object) -> str:
    return str(tuple(outputs.shape)) if isinstance(outputs, Tensor) else described(outputs)


def _described(batch: object) -> str:
    if not isinstance(batch, list | tuple):
        return described(batch)
    return f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch[:4]) or 'nothing'}"
