"""Movers: ops that only rearrange elements are run on the labels themselves.

A label field that varies along one axis is laid out with stride 0 along all the others, the real op runs
on it, and the result is read back. Where it then varies along several axes (a `view` that splits the
channels), the labels are tied until it varies along one.
"""

import logging
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx

from compressor.errors import PassError
from compressor.passes.labels import IntArray, Labeler, Value
from compressor.passes.rules.base import RULES, Call, Change, edit, rule

logger = logging.getLogger(__name__)
aten = torch.ops.aten

_PARTING = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.slice, aten.narrow)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view)
_COPYING = dict.fromkeys(_VIEWS, aten.reshape)  # a label field may need a copy where the tensor needs none


@rule(
    *_VIEWS, aten.flatten, aten.unflatten, aten.permute, aten.transpose, aten.t, aten.squeeze, aten.unsqueeze,
    aten.expand, aten.repeat, aten.flip, aten.movedim, aten.swapaxes, aten.pixel_unshuffle,
    aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.slice, aten.select, aten.narrow, aten.unbind,
)  # fmt: skip
def move(call: Call, labeler: Labeler) -> Value | list[Value]:
    """Run the op on the labels of its first tensor."""
    (value,) = call.values
    axes: list[dict[int, IntArray]] = [{} for _ in call.outputs]
    for axis, labels in value.axes.items():
        shape = [1] * len(value.shape)
        shape[axis] = len(labels)
        field = torch.from_numpy(labels).view(shape).expand(value.shape)
        results = _run(call, field)
        for k, result in enumerate(results):
            _collect(result, axes[k], call, labeler)
        _freeze_lone(results, call, labeler)
    values = [Value(shape, own, value.why) for shape, own in zip(call.outputs, axes, strict=True)]
    if cast(torch._ops.OpOverload, call.node.target).overloadpacket in _PARTING:
        for part in values:
            for labels in part.axes.values():
                labeler.place(labels)  # so that every part is a group of its own and keeps something
    if _is_strided(call) and _is_mutated(call.node):
        labeler.freeze_value(value, f"a strided part of it is changed in place after {call.op}")
    return values if _several(call) else values[0]


def _is_strided(call: Call) -> bool:
    """A slice with a step becomes an index list on removal, and that is no view any more."""
    return call.arguments.get("step", 1) != 1


def _is_mutated(node: fx.Node) -> bool:
    """Whether an op changes a node, or a view of it, in place."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is not None and schema.is_mutable and user.args[0] is node:
            return True
        if RULES.get(getattr(user.target, "overloadpacket", None)) is move and _is_mutated(user):
            return True
    return False


def _run(call: Call, field: Tensor) -> list[Tensor]:
    overload = cast(torch._ops.OpOverload, call.node.target)
    function = _COPYING.get(overload.overloadpacket, overload)
    arguments = [field if isinstance(a, Value) else a for a in call.arguments.values()]
    positional = sum(not argument.kwarg_only for argument in overload._schema.arguments)
    result = function(*arguments[:positional])
    return list(result) if isinstance(result, Sequence) else [result]


def _several(call: Call) -> bool:
    return isinstance(call.node.meta.get("val"), list | tuple)


def _collect(result: Tensor, axes: dict[int, IntArray], call: Call, labeler: Labeler) -> None:
    """Read a label field back: which one axis does it vary along?"""
    varying = [a for a in range(result.dim()) if _varies(result, a)]
    if not varying:
        return
    axis = max([a for a in varying if a > 0] or varying, key=lambda a: _classes(result, a))
    rows = _rows(result, axis, varying)
    if rows.shape[1] > 1:
        first = np.broadcast_to(rows[:, :1], rows.shape)
        pairs = np.unique(np.stack([first.reshape(-1), rows.reshape(-1)]), axis=1)
        labeler.tie(pairs[0], pairs[1])
    if axis in axes:
        for labels in (axes.pop(axis), rows[:, 0]):
            labeler.freeze(labels, f"two labelled axes are merged by {call.op}")
        return
    if _is_computed(call, axis):
        labeler.freeze(rows[:, 0], f"{call.op} computes the size of their axis at run time")
        return
    axes[axis] = rows[:, 0].copy()


def _is_computed(call: Call, axis: int) -> bool:
    """Whether a view gives the size of an axis as a value of the graph."""
    packet = cast(torch._ops.OpOverload, call.node.target).overloadpacket
    return packet in (*_VIEWS, aten.expand) and isinstance(cast(Sequence[object], call.node.args[1])[axis], fx.Node)


def _varies(field: Tensor, axis: int) -> bool:
    if field.shape[axis] <= 1 or field.stride(axis) == 0:
        return False
    return not torch.equal(
        field.narrow(axis, 1, field.shape[axis] - 1),
        field.narrow(axis, 0, 1).expand_as(field.narrow(axis, 1, field.shape[axis] - 1)),
    )


def _classes(field: Tensor, axis: int) -> int:
    """How many kinds of position an axis would keep apart if its labels were tied along all others."""
    others = [a for a in range(field.dim()) if a != axis]
    return len(torch.unique(field.amin(others)))


def _rows(field: Tensor, axis: int, varying: list[int]) -> IntArray:
    """(size of `axis`, everything else it varies along) as numpy."""
    index = tuple(slice(None) if a in varying else 0 for a in range(field.dim()))
    reduced = field[index].movedim(varying.index(axis), 0)
    return cast(IntArray, reduced.reshape(reduced.shape[0], -1).numpy())


def _freeze_lone(results: list[Tensor], call: Call, labeler: Labeler) -> None:
    """A channel that ends up alone (picked by its index, a slice of length 1) has to stay."""
    for result in results:
        if result.numel() and not any(_varies(result, a) for a in range(result.dim())):
            labeler.freeze(result.reshape(-1)[:1].numpy(), f"is picked alone by {call.op}")


@edit(*_VIEWS, aten.expand)
def sizes(change: Change) -> None:
    """Sizes of the result, by axis; `-1` stays."""
    arguments = list(cast(Sequence[fx.node.Argument], change.node.args[1]))
    for axis in change.changed(change.outputs[0]):
        if isinstance(arguments[axis], fx.Node):
            raise PassError(f"{change.call.op} computes the size of a channel axis at run time; it cannot be edited")
        if arguments[axis] != -1:
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


@edit(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)
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
        with change.node.graph.inserting_before(change.node):
            index = change.add_constant(positions)
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


@rule(aten.cat)
def concatenate(call: Call, labeler: Labeler) -> Value:
    """Labels follow one another along the axis; along the others they meet."""
    values = call.values
    axis = call.integer("dim") % len(call.outputs[0])
    axes: dict[int, IntArray] = {}
    for other in range(len(call.outputs[0])):
        holders = [value.axes[other] for value in values if other in value.axes]
        if not holders:
            continue
        if other == axis:
            parts = []
            for value in values:
                labels = value.axes.get(axis)
                if labels is None:
                    labels = labeler.fresh(value.shape[axis])
                    labeler.freeze(labels, f"{value.why or 'a tensor without channels'} is concatenated in {call.op}")
                parts.append(labels)
            axes[axis] = np.concatenate(parts)
            continue
        for labels in holders[1:]:
            labeler.tie(holders[0], labels)
        if len(holders) < len(values):
            labeler.freeze(holders[0], f"meets a tensor without channels in {call.op}")
        axes[other] = holders[0]
    return Value(call.outputs[0], axes, next((v.why for v in values if v.why), ""))


@rule(aten.stack)
def stack(call: Call, labeler: Labeler) -> Value:
    """A new axis without channels; along the others labels meet."""
    axis = call.integer("dim") % len(call.outputs[0])
    lifted = []
    for value in call.values:
        shape = (*value.shape[:axis], 1, *value.shape[axis:])
        lifted.append(Value(shape, {a + (a >= axis): labels for a, labels in value.axes.items()}, value.why))
    axes: dict[int, IntArray] = {}
    for other in {a for value in lifted for a in value.axes}:
        holders = [value.axes[other] for value in lifted if other in value.axes]
        for labels in holders[1:]:
            labeler.tie(holders[0], labels)
        if len(holders) < len(lifted):
            labeler.freeze(holders[0], f"meets a tensor without channels in {call.op}")
        axes[other] = holders[0]
    return Value(call.outputs[0], axes)


@rule(aten.pad, aten.constant_pad_nd)
def pad(call: Call, labeler: Labeler) -> Value:
    """Padding along channels adds blanks: labels of their own that nothing has produced yet.

    Blanks that meet produced channels later (a zero-padded shortcut at its addition) live and die with
    them, and the padding shrinks accordingly.
    """
    x = call.tensor("self")
    axes = dict(x.axes)
    for axis, (before, after) in _padding(call).items():
        labels = axes.get(axis)
        if labels is None:
            continue
        if before < 0 or after < 0 or call.arguments.get("mode", "constant") != "constant":
            labeler.freeze(labels, f"is cropped or reflected by {call.op}")
            axes[axis] = labeler.fresh(call.outputs[0][axis])
            labeler.freeze(axes[axis], f"is cropped or reflected by {call.op}")
        else:
            axes[axis] = np.concatenate([labeler.fresh(before), labels, labeler.fresh(after)])
    return Value(call.outputs[0], axes, x.why)


@edit(aten.pad, aten.constant_pad_nd)
def padding_sizes(change: Change) -> None:
    """As many blanks on either side as are left there."""
    amounts = list(cast(Sequence[fx.node.Argument], change.node.args[1]))
    rank = len(change.inputs.shape)
    for axis, (before, after) in _padding(change.call).items():
        if axis in change.inputs.axes and (before or after):
            kept = change.kept(change.outputs[0], axis)
            place = 2 * (rank - 1 - axis)
            amounts[place] = int(kept[:before].sum())
            amounts[place + 1] = int(kept[len(kept) - after :].sum())
    change.node.update_arg(1, amounts)


def _padding(call: Call) -> dict[int, tuple[int, int]]:
    """Axis -> (before, after); the op lists them from the last axis on."""
    amounts = call.integers("pad")
    rank = len(call.tensor("self").shape)
    return {rank - 1 - k: (amounts[2 * k], amounts[2 * k + 1]) for k in range(len(amounts) // 2)}


@rule(aten.pixel_shuffle)
def pixel_shuffle(call: Call, labeler: Labeler) -> Value:
    """r*r channels become the pixels of one: they are tied."""
    x = call.tensor("self")
    channel = len(x.shape) - 3
    axes = dict(x.axes)
    if channel in axes:
        blocks = axes[channel].reshape(call.outputs[0][channel], -1)
        for column in range(1, blocks.shape[1]):
            labeler.tie(blocks[:, 0], blocks[:, column])
        axes[channel] = blocks[:, 0].copy()
        if len(blocks) == 1:
            labeler.freeze(axes.pop(channel), f"is the only channel that {call.op} makes")
    for axis in [a for a in axes if a > channel]:
        labeler.freeze(axes.pop(axis), f"lies along a spatial axis of {call.op}")
    return Value(call.outputs[0], axes, x.why)


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(call: Call, labeler: Labeler) -> Value:
    """(groups, c) is transposed to (c, groups): position j of every group is tied, so that c may shrink."""
    x = call.tensor("self")
    axes = dict(x.axes)
    if 1 in axes:
        grid = axes[1].reshape(call.integer("groups"), -1)
        for row in grid[1:]:
            labeler.tie(grid[0], row)
        axes[1] = grid.T.reshape(-1).copy()
    return Value(call.outputs[0], axes, x.why)
