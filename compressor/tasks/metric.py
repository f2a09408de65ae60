"""`Metric`: how good a network is, as a number with a name and a unit."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from compressor.errors import DataError
from compressor.tasks.calling import called


class Meter(Protocol):
    """Counts over batches; a new one is made for every evaluation."""

    def update(self, outputs: Any, batch: Any) -> None:
        """Take a batch's outputs, and the batch as the loader gave it (on the same device)."""

    def compute(self) -> float:
        """The metric over all batches so far."""


@dataclass(frozen=True)
class Metric:
    """How good a network is: counted over batches by a `meter`, or found by a function that runs the network itself.

    Attributes:
        name: Such as `mIoU`.
        unit: Such as `%` or `dB`; nothing where it has none.
        higher_is_better: Whether more is better.
        meter: Makes something that counts; see `Meter`.
        whole: Instead: `metric(model, batches) -> float`, which is given the network and the batches as the loader gives them.

    Raises:
        DataError: Neither or both of `meter` and `whole` are given.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    meter: Callable[[], Meter] | None = None
    whole: Callable[[nn.Module, Iterable[Any]], float] | None = None

    def __post_init__(self) -> None:
        """Check that there is one way to find it."""
        if (self.meter is None) == (self.whole is None):
            raise DataError(f"metric {self.name}: give a meter that counts over batches, or a function of (model, batches)")

    @classmethod
    def of(cls, metric: object, pairs: Callable[[Any, Any], tuple[Any, Any]] | None = None) -> "Metric":
        """What a user may write for a metric.

        Args:
            metric: A `Metric`; a metric of torchmetrics; or a function `metric(model, batches) -> float`.
            pairs: Of a metric of torchmetrics: from outputs and batch to `(predictions, targets)`; by default the outputs and
                the second part of the batch.

        Raises:
            DataError: It is none of these.
        """
        if isinstance(metric, Metric):
            return metric
        if isinstance(metric, type):
            raise DataError(f"metric: {metric.__name__} is a class: pass what it makes, such as {metric.__name__}()")
        if hasattr(metric, "update") and hasattr(metric, "compute"):
            higher = getattr(metric, "higher_is_better", True)
            return cls(type(metric).__name__, higher_is_better=higher is not False, meter=lambda: TorchMeter(metric, pairs))
        if callable(metric):
            return cls(getattr(metric, "__name__", type(metric).__name__), whole=metric)
        raise DataError(
            f"a metric is a compressor.Metric, a metric of torchmetrics, or a function metric(model, batches) -> float; found "
            f"{type(metric).__name__}"
        )

    def number(self, value: object) -> float:
        """A value of the metric, checked.

        Raises:
            DataError: It is no number.
        """
        try:
            found = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise DataError(f"metric {self.name}: a number is needed, found {type(value).__name__}") from error
        if math.isnan(found):
            raise DataError(f"metric {self.name}: the value is not a number (NaN)")
        return found

    def value(self, meter: Meter) -> float:
        """What a meter has come to.

        Raises:
            DataError: It fails, or it is no number.
        """
        return self.number(called(f"metric {self.name}: compute()", meter.compute))

    def text(self, value: float) -> str:
        """With its unit: `91.30 %`."""
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.4f}"

    @property
    def heading(self) -> str:
        """Of a column: `accuracy %`."""
        return f"{self.name} {self.unit}".strip()

    def lost(self, before: float, after: float) -> float:
        """How much worse a value is than another; negative where it is better."""
        return before - after if self.higher_is_better else after - before

    def floor(self, floor: float) -> float:
        """What is meant by a floor: of a metric in percent a share, 0 to 1, else a value as it is.

        Raises:
            DataError: A share is larger than 1.
        """
        if self.unit != "%":
            return floor
        if floor > 1:
            raise DataError(f"a floor of {self.name} is a share of 0 to 1, found {floor:g}: write {floor / 100:g} for {floor:g} %")
        return 100 * floor

    def to_dict(self) -> dict[str, object]:
        """Name, unit and direction as plain data."""
        return {"name": self.name, "unit": self.unit, "higher_is_better": self.higher_is_better}


class TorchMeter:
    """A metric of torchmetrics as a `Meter`.

    Args:
        metric: It is copied, and reset.
        pairs: See `Metric.of`.
        scale: Of the value, such as 100 for percent.
        key: Of a metric that gives several numbers, the one that counts; the first by default.
    """

    def __init__(
        self,
        metric: Any,
        pairs: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        scale: float = 1.0,
        key: str | None = None,
    ) -> None:
        self._metric, self._pairs, self._scale, self._key = copy.deepcopy(metric), pairs or _second, scale, key
        self._metric.reset()

    def update(self, outputs: Any, batch: Any) -> None:
        """See `Meter`."""
        predictions, targets = called("the metric's pairs(outputs, batch)", self._pairs, outputs, batch)
        device = getattr(predictions, "device", None)
        if device is not None and getattr(self._metric, "device", device) != device:
            self._metric.to(device)
        called(f"{type(self._metric).__name__}.update", self._metric.update, predictions, targets)

    def compute(self) -> float:
        """See `Meter`."""
        found = self._metric.compute()
        if isinstance(found, dict):
            found = found[self._key or next(iter(found))]
        return self._scale * float(found)


def _second(outputs: Any, batch: Any) -> tuple[Any, Any]:
    return outputs, batch[1]
