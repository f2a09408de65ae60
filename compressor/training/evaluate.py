"""Accuracy of a classifier, and recalibration of its batch norms."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from compressor.data.batches import Batches, labelled
from compressor.errors import DataError
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import device_of
from compressor.values.loaders import batch_count, guarded
from compressor.values.progress import Progress


@dataclass(frozen=True)
class Accuracy:
    """Share of samples whose largest output is the label.

    Attributes:
        correct: Samples that are right.
        count: Samples.
    """

    correct: int
    count: int

    @property
    def percent(self) -> float:
        """In percent."""
        return 100.0 * self.correct / self.count


def evaluate(model: nn.Module, batches: Batches, progress: Progress | None = None) -> Accuracy:
    """Top-1 accuracy in eval mode; the model's own mode is restored.

    Args:
        model: Returns logits (N, classes).
        batches: `(inputs, labels)`.
        progress: Where to say how far it is.

    Raises:
        DataError: There are no batches, they are no pairs, or outputs and labels do not fit.
    """
    correct = count = 0
    device = device_of(model)
    with eval_mode(model), torch.no_grad():
        for k, (x, y) in enumerate(labelled(batches, "validation")):
            output = model(x.to(device))
            if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(y):
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise DataError(f"batch {k}: accuracy needs logits (N, classes) for {len(y)} labels, the model gave {shape}")
            check_labels(y, output, k)
            correct += int((output.argmax(1).cpu() == y.cpu()).sum())
            count += len(y)
            if progress:
                progress.tick(k + 1, batch_count(batches), f"accuracy {100 * correct / count:.2f} %")
    if not count:
        raise DataError("there is no validation data: the loader yields no batch (a generator can be read only once: pass a list)")
    return Accuracy(correct, count)


def check_labels(y: Tensor, output: Tensor, k: int) -> None:
    """Refuse labels that are no classes of a model.

    Args:
        y: Labels (N,) of a batch.
        output: The model's logits (N, classes) for it.
        k: Number of the batch, for the message.

    Raises:
        DataError: Some label is none of the classes, or the model tells none apart.
    """
    if output.dim() != 2 or output.shape[1] < 2:
        raise DataError(f"batch {k}: a classifier gives logits (N, classes) of two classes or more, found {tuple(output.shape)}")
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < output.shape[1]:
        said = f"labels go from {int(y.min())} to {int(y.max())}"
        raise DataError(f"batch {k}: {said}, but the model tells {output.shape[1]} classes apart (0 to {output.shape[1] - 1})")


def recalibrate(model: nn.Module, batches: Batches, limit: int = 50, progress: Progress | None = None) -> int:
    """Re-estimate the running statistics of every batch norm as the plain mean over some batches.

    Removal changes the distribution of features; this repairs mean and variance without any gradient.

    Args:
        model: Its norms are updated in place; modes and momenta are restored.
        batches: `(inputs, labels)`; labels are not looked at.
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
                if not isinstance(batch, list | tuple) or not batch or not isinstance(batch[0], Tensor):
                    raise DataError(f"batch {k} must begin with a tensor of inputs, found {type(batch).__name__}")
                model(batch[0].to(device))
                if progress:
                    progress.tick(k + 1, min(limit, batch_count(batches) or limit), "batch norms")
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)


def norms_of(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms with running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
