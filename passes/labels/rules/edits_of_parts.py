"""Parts: how the constants of split, chunk, slice, narrow and select follow a removal. Labels: see `views.py`."""

from typing import cast

import numpy as np
import torch

from compressor.errors import PassError
from compressor.passes.labels.rules.base import Change, edit

aten = torch.ops.aten


@edit(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unsafe_split, aten.unsafe_chunk)
def split_sizes(change: Change) -> None:
    """Whatever way a split was written, afterwards it names the size of each part."""
    axis = change.call.integer("dim") % len(change.inputs.shape)
    if change.unchanged(change.inputs, axis):
        return
    parts = [change.size(output, axis) for output in change.outputs]
    change.node.target = aten.split_with_sizes.default
    change.node.args = (change.node.args[0], parts, axis)
    change.node.kwargs = {}


@edit(aten.slice)
def slice_bounds(change: Change) -> None:
    """The selected positions, counted on what is left; by an index list where they are no slice any more."""
    axis = change.call.integer("dim") % len(change.inputs.shape)
    if change.unchanged(change.inputs, axis):
        return  # bounds along other axes may be symbolic, and mean other positions at another batch size
    kept = change.kept(change.inputs, axis)
    start, end, step = (change.call.arguments[name] for name in ("start", "end", "step"))
    chosen = np.zeros_like(kept)
    chosen[slice(cast(int | None, start), cast(int | None, end), cast(int, step))] = True
    positions = np.flatnonzero(chosen[kept])
    if not len(positions):
        raise PassError(f"the plan leaves nothing of what {change.call.op} selects")
    strides = set(np.diff(positions).tolist())
    if len(strides) <= 1:
        by = strides.pop() if strides else 1
        change.node.args = (change.node.args[0], axis, int(positions[0]), int(positions[-1]) + 1, by)
    else:
        index = change.constant(positions, "")
        change.node.target = aten.index_select.default
        change.node.args = (change.node.args[0], axis, index)
    change.node.kwargs = {}


@edit(aten.narrow)
def narrow_bounds(change: Change) -> None:
    """Start and length, counted on what is left."""
    axis = change.call.integer("dim") % len(change.inputs.shape)
    if change.unchanged(change.inputs, axis):
        return
    start = int(change.kept(change.inputs, axis)[: change.call.integer("start")].sum())
    change.node.args = (change.node.args[0], axis, start, change.size(change.outputs[0], axis))


@edit(aten.select)
def selected_index(change: Change) -> None:
    """The index of the selected channel (which is frozen), counted on what is left."""
    axis = change.call.integer("dim") % len(change.inputs.shape)
    if change.unchanged(change.inputs, axis):
        return
    index = change.call.integer("index") % change.inputs.shape[axis]
    change.node.update_arg(2, int(change.kept(change.inputs, axis)[:index].sum()))
