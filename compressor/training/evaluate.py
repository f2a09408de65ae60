"""How good a network is, by the metric of its task; and recalibration of its batch norms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import device_of
from compressor.tasks.calling import called
from compressor.tasks.metric import Meter
from compressor.tasks.samples import Batches, Sample, Samples, samples_of
from compressor.values.loaders import batch_count, guarded
from compressor.values.progress import Progress


@dataclass(frozen=True)
class Score:
    """What a network was found to be worth.

    Attributes:
        value: Of the task's metric.
        count: Samples that were looked at.
    """

    value: float
    count: int


def evaluate(model: nn.Module, batches: Batches, progress: Progress | None = None) -> Score:
    """The metric of a network in eval mode; its own mode is restored.

    Args:
        model: The network.
        batches: `Samples`; or pairs `(inputs, labels)` of a classifier.
        progress: Where to say how far it is.

    Raises:
        DataError: There are no batches, they are not what the task reads, or outputs and batches do not fit.
    """
    samples = samples_of(batches)
    metric = samples.task.metric
    if metric.whole is not None:
        return _as_a_whole(model, samples)
    assert metric.meter is not None
    meter, count, device = metric.meter(), 0, device_of(model)
    with eval_mode(model), torch.no_grad():
        for sample in samples.read("validation"):
            sample = sample.to(device)
            counted(meter, sample, sample.outputs(model))
            count += sample.count
            if progress:
                so_far = getattr(meter, "so_far", None)
                progress.tick(sample.number + 1, batch_count(samples), so_far() if so_far is not None else metric.name)
    if not count:
        raise DataError("there is no validation data: the loader yields no batch (a generator can be read only once: pass a list)")
    return Score(metric.value(meter), count)


def counted(meter: Meter, sample: Sample, outputs: object) -> None:
    """Let a meter look at a batch.

    Raises:
        DataError: It cannot; the batch is named.
    """
    try:
        meter.update(outputs, sample.batch)
    except DataError as error:
        raise DataError(f"batch {sample.number}: {error}") from error
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise DataError(f"batch {sample.number}: the metric failed: {type(error).__name__}: {line}") from error


def by_function(model: nn.Module, samples: Sequence[Sample]) -> float:
    """The metric of a function of the user's, over batches that have been read."""
    metric, around = samples[0].task.metric, samples[0].around
    assert metric.whole is not None
    network = around(model) if around is not None else model
    with eval_mode(model), torch.no_grad():
        found = called(f"{metric.name}(model, batches)", metric.whole, network, [sample.batch for sample in samples])
    return metric.number(found)


def _as_a_whole(model: nn.Module, samples: Samples) -> Score:
    """The same over a loader, which is read by the function."""
    metric = samples.task.metric
    assert metric.whole is not None
    seen = _Seen(samples)
    network = samples.around(model) if samples.around is not None else model
    with eval_mode(model), torch.no_grad():
        value = called(f"{metric.name}(model, batches)", metric.whole, network, seen)
    return Score(metric.number(value), seen.count)


class _Seen:
    """Batches that are counted as they are read."""

    def __init__(self, samples: Samples) -> None:
        self._samples, self.count = samples, 0

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[object]:
        for sample in self._samples.read("validation"):
            self.count += sample.count
            yield sample.batch


def recalibrate(model: nn.Module, batches: Batches, limit: int = 50, progress: Progress | None = None) -> int:
    """Re-estimate the running statistics of every batch norm as the plain mean over some batches.

    Removal changes the distribution of features; this repairs mean and variance without any gradient.

    Args:
        model: Its norms are updated in place; modes and momenta are restored.
        batches: Tuples that begin with a tensor of inputs, or with a tuple of them.
        limit: How many batches at most.
        progress: Where to say how far it is.

    Returns:
        How many batch norms were recalibrated.
    """
    norms = norms_of(model)
    if not norms:
        return 0
    device = device_of(model)
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative mean
            norm.train()
        try:
            for k, batch in enumerate(islice(guarded(batches, "batch norms"), limit)):
                inputs = batch[0] if isinstance(batch, list | tuple) and batch else None
                inputs = inputs if isinstance(inputs, tuple) else (inputs,)
                if not all(isinstance(x, Tensor) for x in inputs):
                    raise DataError(f"batch {k} must begin with a tensor of inputs, found {type(batch).__name__}")
                model(*[x.to(device) for x in inputs])
                if progress:
                    progress.tick(k + 1, min(limit, batch_count(batches) or limit), "batch norms")
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)


def norms_of(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms with running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
