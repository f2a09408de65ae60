"""Gradients of the loss at the trained weights, for criteria and searches that need them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import DYNAMIC, device_of
from compressor.training.evaluate import check_labels
from compressor.values.progress import Progress


def mean_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]] | None, limit: int = 20) -> dict[str, Tensor]:
    """Mean gradient of the cross-entropy over some batches, in eval mode (norms use their running statistics).

    Args:
        model: The model; left as it was.
        batches: `(inputs, labels)`.
        limit: How many batches at most.

    Returns:
        Parameter name -> gradient, for the parameters that have one.

    Raises:
        DataError: There is no data, or the loss is not finite.
    """
    if batches is None:
        raise DataError("this criterion needs training data: pass train=…")
    totals = {name: torch.zeros_like(p) for name, p in _parameters(model).items()}
    count = 0
    for _, gradients in _batch_by_batch(model, batches):
        for name, gradient in gradients.items():
            totals[name] += gradient
        count += 1
        if count >= limit:
            break
    if not count:
        raise DataError("the training data is empty; no gradients")
    return {name: total / count for name, total in totals.items()}


def squared_gradients(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], images: int, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Square of the mean gradient of the cross-entropy for every element of every parameter, in eval mode.

    Args:
        model: The model; left as it was.
        batches: `(inputs, labels)`.
        images: How many images are read at most.
        progress: Where to say how far it is.

    Raises:
        DataError: There is no data, or the loss is not finite.
    """
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in _parameters(model).items()}
    seen = 0
    for count, gradients in _batch_by_batch(model, batches, images):
        for name, gradient in gradients.items():
            totals[name] += count * gradient.double()
        seen += count
        if progress:
            progress.tick(seen, images, "gradients")
    if not seen:
        raise DataError("there are no labelled images for gradients: pass train=… (or validate=…)")
    return {name: (total / seen).square() for name, total in totals.items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All of them: what is frozen in training is worth as much."""
    return dict(model.named_parameters())


def _batch_by_batch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], images: int | None = None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Images and gradients of batch after batch, in eval mode, until so many images have been seen."""
    parameters, whole = _parameters(model), not getattr(model, "meta", {}).get(DYNAMIC, True)
    frozen = [p for p in parameters.values() if not p.requires_grad]
    device = device_of(model)
    seen = 0
    with eval_mode(model), torch.enable_grad(), _thawed(frozen):
        for k, (x, y) in enumerate(batches):
            if images is not None and not whole:  # some networks take batches of one size alone
                x, y = x[: images - seen], y[: images - seen]
            output = model(x.to(device))
            check_labels(y, output, k)
            loss = F.cross_entropy(output, y.to(device))
            if not torch.isfinite(loss):
                raise DataError(f"the loss of batch {k} is not finite; check the data and the weights")
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            yield len(y), {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
            seen += len(y)
            if images is not None and seen >= images:
                break


@contextmanager
def _thawed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that ask for gradients inside, and do not outside."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
