"""No labels: a network is as good as its outputs are the original's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import ClassDivergence, Distance, SquaredError, mean_of
from compressor.passes.tracing.trace import device_of
from compressor.tasks.classification import classification
from compressor.tasks.metric import Metric
from compressor.tasks.samples import Around, Samples
from compressor.tasks.task import Task

AGREEMENT = "agreement with the original"


def agreement(original: fx.GraphModule, images: Calibration, distance: Distance, around: Around | None = None) -> Samples:
    """Images with what the original says of them for labels.

    Of a classifier these are the classes that it names, and the metric is the share of images where they are named again; of
    another network they are its outputs, and the metric is the coefficient of determination R²: 100 % where all outputs are
    given again, 0 % for a network that gives the mean of each.

    Args:
        original: The network.
        images: Without labels.
        distance: How outputs are compared; that of classes makes it a classifier's.
        around: What the network is a part of.

    Raises:
        DataError: No output is of floating point.
    """
    device, whole = device_of(original), around(original) if around is not None else original
    with torch.no_grad():
        outputs = [whole(*[x.to(device) for x in batch]) for batch in images.batches]
    if isinstance(distance, ClassDivergence):
        labels = [distance.kept(own).argmax(1).cpu() for own in outputs]
        if all(own.dim() == 1 for own in labels):
            task = classification()
            task = Task(task.loss, Metric(AGREEMENT, "%", meter=task.metric.meter), compare=distance, name="agreement")
        else:
            task = Task(_class_loss, Metric(AGREEMENT, "%", meter=_SameClasses), compare=distance, name="agreement")
        return Samples([(batch, own) for batch, own in zip(images.batches, labels, strict=True)], task, around=around)
    own = SquaredError()
    wanted = [[x.cpu() for x in own.kept(output)] for output in outputs]
    task = Task(_squared_loss, Metric(AGREEMENT, "%", meter=_Determination), compare=distance, name="agreement")
    return Samples([(batch, some) for batch, some in zip(images.batches, wanted, strict=True)], task, around=around)


def _class_loss(outputs: Any, batch: Any) -> Tensor:
    logits = ClassDivergence(1.0).kept(outputs).float()
    return torch.nn.functional.nll_loss(logits, batch[1])


def _squared_loss(outputs: Any, batch: Any) -> Tensor:
    own = SquaredError()
    return mean_of(own.terms(own.kept(outputs), batch[1]))


class _SameClasses:
    """Share of positions whose largest output is that of the original, in percent."""

    def __init__(self) -> None:
        self._right = self._count = 0

    def update(self, outputs: Any, batch: Any) -> None:
        found = ClassDivergence().kept(outputs).argmax(1)
        self._right += int((found == batch[1]).sum())
        self._count += batch[1].numel()

    def compute(self) -> float:
        return 100.0 * self._right / self._count


class _Determination:
    """R² of every output in percent, averaged over outputs."""

    def __init__(self) -> None:
        self._errors: list[float] = []
        self._squares: list[float] = []
        self._sums: list[float] = []
        self._counts: list[int] = []

    def update(self, outputs: Any, batch: Any) -> None:
        found, wanted = SquaredError().kept(outputs), batch[1]
        if [tuple(x.shape) for x in found] != [tuple(x.shape) for x in wanted]:
            raise DataError(f"the outputs changed their structure: found {_shapes(found)}, the original gives {_shapes(wanted)}")
        if not self._counts:
            self._errors, self._squares, self._sums = ([0.0] * len(wanted) for _ in range(3))
            self._counts = [0] * len(wanted)
        for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
            own, other = a.double(), b.double()
            self._errors[k] += float((own - other).square().sum())
            self._squares[k] += float(other.square().sum())
            self._sums[k] += float(other.sum())
            self._counts[k] += other.numel()

    def compute(self) -> float:
        found = []
        for error, squares, total, count in zip(self._errors, self._squares, self._sums, self._counts, strict=True):
            spread = squares - total * total / count
            found.append(100.0 * (1 - error / max(spread, 1e-12)))
        return sum(found) / len(found)


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in tensors]
