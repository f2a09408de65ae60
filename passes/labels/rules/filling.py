"""Tensors filled with one number: along every axis they may be as long as whatever they meet."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from compressor.passes.labels.labeler import Labeler, Value
from compressor.passes.labels.rules.base import Call, Change, edit, rule

aten = torch.ops.aten

FILLS = (aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
_SIZES = {aten.zeros: 0, aten.ones: 0, aten.full: 0}  # position of the sizes; the others come after a tensor


@rule(*FILLS)
def fill(call: Call, labeler: Labeler) -> Value:
    """Blanks along every axis whose size is a constant of the graph."""
    shape = call.outputs[0]
    sizes = cast(Sequence[object], call.node.args[_SIZES.get(call.node.target.overloadpacket, 1)])  # type: ignore[union-attr]
    axes = {
        axis: labeler.blanks(size)
        for axis, size in enumerate(shape)
        if axis > 0 and size > 1 and not isinstance(sizes[axis], fx.Node)
    }
    return Value(shape, axes)


@edit(*FILLS)
def filled_sizes(change: Change) -> None:
    """As long as what is left of what they meet."""
    place = _SIZES.get(change.node.target.overloadpacket, 1)  # type: ignore[union-attr]
    sizes = list(cast(Sequence[int], change.node.args[place]))
    for axis in change.changed(change.outputs[0]):
        sizes[axis] = change.size(change.outputs[0], axis)
    change.node.update_arg(place, sizes)
