"""Sizes: how the constants of views, expansions, repetitions and rolls follow a removal. Labels: see `views.py`."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from compressor.passes.labels.rules.base import Change, edit
from compressor.passes.labels.rules.views import VIEWS

aten = torch.ops.aten


@edit(aten.repeat)
def repetitions(change: Change) -> None:
    """An axis of length 1 is repeated as often as whatever it meets is long."""
    counts = list(cast(Sequence[fx.node.Argument], change.node.args[1]))
    offset = len(counts) - len(change.inputs.shape)
    for axis in change.changed(change.outputs[0]):
        if axis < offset or change.inputs.shape[axis - offset] == 1:
            counts[axis] = change.size(change.outputs[0], axis)
    change.node.update_arg(1, counts)


@edit(*VIEWS, aten.expand, aten.broadcast_to)
def sizes(change: Change) -> None:
    """Sizes of the result, by axis; `-1` stays."""
    arguments = list(cast(Sequence[fx.node.Argument], change.node.args[1]))
    for axis in change.changed(change.outputs[0]):
        if isinstance(arguments[axis], fx.Node):
            arguments[axis] = -1  # see `_is_computed`: the only one that can be inferred
        elif arguments[axis] != -1:
            arguments[axis] = change.size(change.outputs[0], axis)
    change.node.update_arg(1, arguments)


@edit(aten.squeeze)
def squeezed_axes(change: Change) -> None:
    """The axes that were squeezed, by number: an axis that only now has the length 1 stays."""
    shape = change.inputs.shape
    if "dim" not in change.call.arguments:
        change.node.target = aten.squeeze.dims
        change.node.args = (change.node.args[0], [axis for axis, size in enumerate(shape) if size == 1])


@edit(aten.unflatten)
def unflattened_sizes(change: Change) -> None:
    """Sizes of the axes that one axis is split into."""
    start = change.call.integer("dim") % len(change.inputs.shape)
    arguments = list(cast(Sequence[int], change.node.args[2]))
    for axis in change.changed(change.outputs[0]):
        if start <= axis < start + len(arguments) and arguments[axis - start] != -1:
            arguments[axis - start] = change.size(change.outputs[0], axis)
    change.node.update_arg(2, arguments)


@edit(aten.roll)
def rolled_positions(change: Change) -> None:
    """As many positions as are left of those that were rolled over the end."""
    dims = [d % len(change.inputs.shape) for d in change.call.integers("dims")]
    shifts = change.call.integers("shifts")
    for k, axis in enumerate(dims):
        kept = change.kept(change.outputs[0], axis)
        if not kept.all():
            shifts[k] = int(kept[: shifts[k] % len(kept)].sum())
    change.node.update_arg(1, shifts)
