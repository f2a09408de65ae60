"""No labels: a network is as good as its outputs are the original's."""

from typing import Any

import torch
from torch import Tensor, fx

from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import ClassDivergence, Distance, SquaredError, mean_of
from compressor.passes.tracing.trace import device_of
from compressor.tasks.classification import classification
from compressor.tasks.metric import Metric
from compressor.tasks.samples import Samples
from compressor.tasks.task import Task

AGREEMENT = "agreement with the original"


def agreement(original: fx.GraphModule, images: Calibration, distance: Distance) -> Samples:
    """Images with what the original says of them for labels.

    Of a classifier these are the classes that it names, and the metric is the share of images where they are named again; of
    another network they are its outputs, and the metric is the coefficient of determination R²: 100 % where all outputs are
    given again, 0 % for a network that gives the mean of each.

    Args:
        original: The network.
        images: Without labels.
        distance: How outputs are compared; that of classes makes it a classifier's.

    Raises:
        DataError: No output is of floating point.
    """
    device = device_of(original)
    with torch.no_grad():
        outputs = [original(*[x.to(device) for x in batch]) for batch in images.batches]
    if isinstance(distance, ClassDivergence):
        labels = [distance.kept(own).argmax(1).cpu() for own in outputs]
        if all(own.dim() == 1 for own in labels):
            task = classification()
            task = Task(task.loss, Metric(AGREEMENT, "%", meter=task.metric.meter), compare=distance, name="agreement")
        else:
            task = Task(_class_loss, Metric(AGREEMENT, "%", meter=_SameClasses), compare=distance, name="agreement")
        return Samples([(batch, own) for batch, own in zip(images.batches, labels, strict=True)], task)
    own = SquaredError()
    wanted = [[x.cpu() for x in own.kept(output)] for output in outputs]
    task = Task(_squared_loss, Metric(AGREEMENT, "%", meter=_Determination), compare=distance, name="agreement")
    return Samples([(batch, some) for batch, some in zip(images.batches, wanted, strict=True)], task)


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
        self._sums: list[list[float]] = []  # of each output: errors squared, squares, values, how many

    def update(self, outputs: Any, batch: Any) -> None:
        own = SquaredError()
        terms = own.terms(own.kept(outputs), batch[1])
        pairs = zip(terms, batch[1], strict=True)
        found = [[float(error), float(squares), float(x.double().sum()), x.numel()] for (error, squares), x in pairs]
        before = self._sums or [[0.0] * 4 for _ in found]
        self._sums = [[a + b for a, b in zip(*both, strict=True)] for both in zip(before, found, strict=True)]

    def compute(self) -> float:
        found = []
        for error, squares, total, count in self._sums:
            spread = squares - total * total / count
            found.append(100.0 * (1 - error / max(spread, 1e-12)))
        return sum(found) / len(found)
