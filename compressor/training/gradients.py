"""Gradients of the task's loss at the trained weights, for criteria and searches that need them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import DYNAMIC, device_of
from compressor.tasks.samples import Batches, samples_of
from compressor.values.progress import Progress


def mean_gradients(model: nn.Module, batches: Batches | None, limit: int = 20) -> dict[str, Tensor]:
    """Mean gradient of the loss over some batches, in eval mode (norms use their running statistics).

    Args:
        model: The model; left as it was.
        batches: `Samples`; or pairs `(inputs, labels)` of a classifier.
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


def squared_gradients(model: nn.Module, batches: Batches, images: int, progress: Progress | None = None) -> dict[str, Tensor]:
    """Square of the mean gradient of the loss for every element of every parameter, in eval mode.

    Args:
        model: The model; left as it was.
        batches: `Samples`; or pairs `(inputs, labels)` of a classifier.
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


def _batch_by_batch(model: nn.Module, batches: Batches, images: int | None = None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Images and gradients of batch after batch, in eval mode, until so many images have been seen."""
    parameters, whole = _parameters(model), not getattr(model, "meta", {}).get(DYNAMIC, True)
    frozen = [p for p in parameters.values() if not p.requires_grad]
    device = device_of(model)
    seen = 0
    with eval_mode(model), torch.enable_grad(), _thawed(frozen):
        for sample in samples_of(batches).read("gradients"):
            if images is not None and not whole:  # some networks take batches of one size alone
                sample = sample.first(images - seen)
            sample = sample.to(device)
            loss = sample.loss(sample.outputs(model))
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            yield sample.count, {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
            seen += sample.count
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
