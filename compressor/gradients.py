"""Gradients of the loss at the trained weights, for criteria and searches that need them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import DataError


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
