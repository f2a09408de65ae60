"""Shapes of a traced graph: what every node yields, as plain integers.

`trace` reads them once from the fake tensors of `torch.export` and lets those go: plain tuples are copied
and narrowed a thousand times faster, and a search narrows graphs by the hundred.
"""

from typing import TypeAlias

import torch
from torch import Tensor, fx

from compressor.errors import TraceError

VALUE = "compressor.value"
"""Key of `node.meta`: the shape of the one tensor that a node yields (with the traced batch size in place of the
symbol), a list of them, a number for sizes and other scalars, or None."""

Shape: TypeAlias = tuple[int, ...]


def record_shapes(graph: fx.Graph) -> None:
    """Replace `meta["val"]` of every node by `meta[VALUE]`."""
    for node in graph.nodes:
        node.meta[VALUE] = _plain(node.meta.pop("val", None))


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(_number(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.SymInt):
        return _number(value)
    return value if isinstance(value, int | float) else None


def _number(size: int | torch.SymInt) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is None:
        raise TraceError(
            f"the size {size} depends on the data (a boolean mask, `nonzero`); index by positions that are known before, "
            "or hand over the part of the model without it"
        )
    return int(size.node.hint)


def shapes_of(node: fx.Node) -> tuple[Shape, ...]:
    """Shape of every tensor that a node yields; nothing for sizes and other scalars."""
    value = node.meta.get(VALUE)
    if isinstance(value, tuple):
        return (value,)
    return tuple(shape for shape in value if isinstance(shape, tuple)) if isinstance(value, list) else ()


def yields_several(node: fx.Node) -> bool:
    """Whether a node yields a list of tensors."""
    return isinstance(node.meta.get(VALUE), list)


def scalar_of(node: fx.Node) -> int | float | None:
    """The traced value of a node that yields a number."""
    value = node.meta.get(VALUE)
    return value if isinstance(value, int | float) else None
