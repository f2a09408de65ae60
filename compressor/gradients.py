"""Gradients of the loss at the trained weights, for criteria and searches that need them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.passes.base import eval_mode
from compressor.progress import Progress


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
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    training = model.training
    model.eval()
    count = 0
    try:
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            if not torch.isfinite(loss):
                raise DataError(f"the loss of batch {count} is not finite; check the data and the weights")
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, grad in zip(totals.values(), grads, strict=True):
                if grad is not None:
                    total += grad
            count += 1
            if count >= limit:
                break
    finally:
        model.train(training)
    if not count:
        raise DataError("the training data is empty; no gradients")
    return {name: total / count for name, total in totals.items()}


def squared_gradients(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], images: int, fisher: bool, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Squared gradient of the cross-entropy for every element of every parameter, in eval mode.

    Args:
        model: The model; left as it was.
        batches: `(inputs, labels)`.
        images: How many images are read at most.
        fisher: The mean of the squared gradients of the batches, instead of the square of their mean: at a trained optimum the
            mean is near zero and mostly noise.
        progress: Where to say how far it is.

    Raises:
        DataError: There is no data, or the loss is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    seen = 0
    with eval_mode(model):
        for k, (x, y) in enumerate(batches):
            x, y = x[: images - seen], y[: images - seen]
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            if not torch.isfinite(loss):
                raise DataError(f"the loss of batch {k} is not finite; check the data and the weights")
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, grad in zip(totals.values(), grads, strict=True):
                if grad is not None:
                    total += len(y) * (grad.double().square() if fisher else grad.double())
            seen += len(y)
            if progress:
                progress.tick(seen, images, "gradients")
            if seen >= images:
                break
    if not seen:
        raise DataError("there are no labelled images for gradients: pass train=… (or validate=…)")
    return {name: total / seen if fisher else (total / seen).square() for name, total in totals.items()}
