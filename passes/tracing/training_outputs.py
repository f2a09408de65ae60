"""Models that give other outputs in training than in eval mode: detectors often do (what the loss reads, instead of boxes)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.passes.tracing.modes import untouched


def other_in_training(model: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    """How a model's outputs in training mode differ from those in eval mode, which a traced graph gives in both.

    Args:
        model: It is left as it was.
        inputs: That it runs on.

    Returns:
        A sentence; None where they have one structure and the same shapes, or where it does not run in training mode on inputs
        alone.
    """
    found = []
    try:
        with untouched(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training in (False, True):
                model.train(training)
                found.append(_structure(model(*(torch.cat([x, x]) if x.dim() else x for x in inputs))))
    except Exception:
        return None
    if found[0] == found[1]:
        return None
    return (
        f"in training mode this model gives {found[1]}, in eval mode {found[0]}: a graph gives the latter in both, for the loss too"
    )


def _structure(outputs: object) -> str:
    """Containers, keys and shapes."""
    leaves, spec = pytree.tree_flatten(outputs)
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
    kind = type(outputs).__name__
    return (
        f"a {kind} of {', '.join(map(str, shapes[:6]))}{' …' if len(shapes) > 6 else ''}" if spec.num_children else str(shapes[0])
    )
