"""Indexing by constants, and windows that are laid out as channels (im2col) or put back (col2im).

Where positions come from a stored tensor of the graph, the index itself is a constant that follows the
removal: the same channels are picked, counted on what is left.
"""

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx

from compressor.passes.labels.labeler import IntArray, Labeler, Value
from compressor.passes.labels.rules.base import Call, Change, edit, rule
from compressor.passes.labels.rules.elementwise import meet

aten = torch.ops.aten


@rule(aten.index_select)
def index_select(call: Call, labeler: Labeler) -> Value:
    """A list of positions along one axis."""
    x = call.tensor("self")
    axis = call.integer("dim") % len(x.shape)
    labels = x.axes.get(axis)
    axes = {a: own for a, own in x.axes.items() if a != axis}
    if labels is not None:
        index = _constant(call, "index")
        if index is None:
            labeler.freeze(labels, f"is picked by positions that {call.op} gets at run time")
        else:
            axes[axis] = _picked(labels, index, call.tensor("index"), labeler)
    return Value(call.outputs[0], axes, x.why)


@edit(aten.index_select)
def selected_positions(change: Change) -> None:
    """The positions that are left, counted on what is left."""
    axis = change.call.integer("dim") % len(change.inputs.shape)
    index = _constant(change.call, "index")
    if index is not None and not change.unchanged(change.inputs, axis):
        change.node.update_arg(2, change.constant(_recounted(change, index, axis), _name(change.call, "index")))


@rule(aten.index)
def index(call: Call, labeler: Labeler) -> Value:
    """`x[:, positions]`: one list of positions for one axis; anything else keeps the indexed axes as they are."""
    x = call.tensor("self")
    indices = cast(list[object], call.arguments["indices"])
    given = [a for a, one in enumerate(indices) if isinstance(one, Value)]
    stored = _constant(call, "indices")
    single = len(given) == 1 and stored is not None and stored.ndim == 1 and stored.dtype != np.bool_
    shift = len(call.outputs[0]) - len(x.shape)
    axes: dict[int, IntArray] = {}
    for axis, labels in x.axes.items():
        if axis not in given:
            if not given or axis < given[0] or given[-1] - given[0] + 1 == len(given):
                axes[axis + (shift if given and axis > given[-1] else 0)] = labels
            else:
                labeler.freeze(labels, f"is moved by {call.op}")
        elif single and stored is not None:
            axes[axis] = _picked(labels, stored, cast(Value, indices[axis]), labeler)
        else:
            labeler.freeze(labels, f"is picked by positions in {call.op}")
    return Value(call.outputs[0], axes, x.why)


@edit(aten.index)
def indexed_positions(change: Change) -> None:
    """As for `index_select`."""
    indices = list(cast(list[fx.node.Argument], change.node.args[1]))
    stored = _constant(change.call, "indices")
    for axis, one in enumerate(indices):
        if one is not None and stored is not None and not change.unchanged(change.inputs, axis):
            indices[axis] = change.constant(_recounted(change, stored, axis), _name(change.call, "indices"))
    change.node.update_arg(1, indices)


@rule(aten.gather, aten.take_along_dim)
def gather(call: Call, labeler: Labeler) -> Value:
    """Positions per element: the axis that they count along stays, the others meet the index."""
    x, position = call.values
    dim = call.arguments["dim"]
    axis = None if dim is None else int(cast(int, dim)) % len(x.shape)
    same = {a for a in x.axes if axis is not None and a != axis and position.shape[a] in (1, x.shape[a])}
    for a in set(x.axes) - same:
        labeler.freeze(x.axes[a], f"is picked by positions in {call.op}")
    if axis is None:
        return Value(call.outputs[0], {}, f"the output of {call.op}")
    shape = tuple(size if a in same else 1 for a, size in enumerate(x.shape))
    others = Value(shape, {a: own for a, own in x.axes.items() if a in same}, x.why)
    return meet([others, position], call.outputs[0], call.op, labeler)


@rule(aten.im2col)
def im2col(call: Call, labeler: Labeler) -> Value:
    """(n, c, h, w) -> (n, c * kernel, positions), the channel first."""
    x = call.tensor("self")
    kernel = math.prod(call.integers("kernel_size"))
    _freeze_space(x, len(x.shape) - 3, call, labeler)
    labels = x.axes.get(len(x.shape) - 3)
    return Value(call.outputs[0], {} if labels is None else {len(x.shape) - 3: labels.repeat(kernel)}, x.why)


@rule(aten.col2im)
def col2im(call: Call, labeler: Labeler) -> Value:
    """(n, c * kernel, positions) -> (n, c, h, w): what belongs to one channel is tied."""
    x = call.tensor("self")
    kernel = math.prod(call.integers("kernel_size"))
    channel = len(x.shape) - 2
    _freeze_space(x, channel, call, labeler)
    labels = x.axes.get(channel)
    if labels is None:
        return Value(call.outputs[0], {}, x.why)
    blocks = labels.reshape(-1, kernel)
    for column in range(1, kernel):
        labeler.tie(blocks[:, 0], blocks[:, column])
    return Value(call.outputs[0], {channel: blocks[:, 0].copy()}, x.why)


def _freeze_space(x: Value, channel: int, call: Call, labeler: Labeler) -> None:
    for axis, labels in x.axes.items():
        if axis > channel:
            labeler.freeze(labels, f"lies along a spatial axis of {call.op}")


def _picked(labels: IntArray, positions: IntArray, index: Value, labeler: Labeler) -> IntArray:
    """The labels at the positions; the list of positions itself becomes shorter with them."""
    picked = labels[positions]
    if len(positions) == 1:
        labeler.freeze(picked, "is picked alone by its index")
    elif 0 in index.axes:
        labeler.tie(index.axes[0], picked)
    labeler.place(picked)
    return picked


def _recounted(change: Change, positions: IntArray, axis: int) -> IntArray:
    """Positions of what stays, counted on what stays."""
    kept = change.kept(change.inputs, axis)
    wrapped = positions % len(kept)
    return np.asarray((np.cumsum(kept) - 1)[wrapped[kept[wrapped]]], dtype=np.int64)


def _name(call: Call, name: str) -> str:
    value = call.arguments[name]
    return next(v.name for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value))


def _constant(call: Call, name: str) -> IntArray | None:
    """The stored index tensor among the arguments, if there is exactly one and nothing else."""
    value = call.arguments[name]
    found = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value)]
    if len(found) != 1 or not found[0].name:
        return None
    tensor = call.stored(found[0].name)
    return (
        tensor.detach().cpu().numpy()
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.dim() == 1
        else None
    )
