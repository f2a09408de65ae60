"""Views and other ops that only rearrange elements: the real op is run on the labels themselves.

A label field that varies along one axis is laid out with stride 0 along all the others, the real op runs
on it, and the result is read back. Where it then varies along several axes (a `view` that splits the
channels), it becomes a `Split`, and one of its axes is chosen when an op needs to know (`splits.py`).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx

from compressor.passes.labels.labeler import Grid, IntArray, Labeler, Split, Value
from compressor.passes.labels.rules.base import RULES, Call, carries, rule, spares
from compressor.passes.labels.rules.elementwise import meet
from compressor.passes.labels.splits import settle
from compressor.passes.tracing.shapes import yields_several

aten = torch.ops.aten

VIEWS = (aten.view, aten.reshape, aten._unsafe_view)
PARTS = (
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.unsafe_split,
    aten.unsafe_chunk,
    aten.tensor_split,
    aten.slice,
    aten.narrow,
)
_COPYING = dict.fromkeys(VIEWS, aten.reshape)  # a label field may need a copy where the tensor needs none
_CARRYING = (
    *VIEWS, aten.permute, aten.transpose, aten.t, aten.squeeze, aten.unsqueeze, aten.expand, aten.movedim, aten.swapaxes,
    aten.select, aten.unbind, aten.unflatten, aten.flatten, aten.broadcast_to, aten.swapdims, aten.moveaxis,
)  # fmt: skip


@rule(
    *_CARRYING, *PARTS, aten.repeat, aten.flip, aten.pixel_unshuffle, aten.roll, aten.repeat_interleave,
    aten.tile, aten.unfold,
)  # fmt: skip
def move(call: Call, labeler: Labeler) -> Value | list[Value]:
    """Run the op on the labels of its first tensor."""
    (value,) = call.values
    value, carried = _carry(call, value, labeler)
    if not carried:
        value = settle(value, labeler, _spared(call, value))
    _FREEZES.get(_packet(call), _nothing)(call, value, labeler)
    axes: list[dict[int, IntArray]] = [{} for _ in call.outputs]
    grids: list[list[Grid]] = [carried.get(k, []) for k in range(len(call.outputs))]
    for axis, labels in value.axes.items():
        shape = [1] * len(value.shape)
        shape[axis] = len(labels)
        results = _run(call, torch.from_numpy(labels).view(shape).expand(value.shape))
        for k, result in enumerate(results):
            _collect(result, axes[k], grids[k], call, labeler)
        _freeze_lone(results, call, labeler)
    for k, (shape_after, own) in enumerate(zip(call.outputs, axes, strict=True)):
        _label_repeats(call, value, shape_after, own, grids[k], labeler)
    values = [
        Value(shape_after, own, value.why, grids=tuple(spread))
        for shape_after, own, spread in zip(call.outputs, axes, grids, strict=True)
    ]
    if _packet(call) in PARTS:
        for part in values:
            for labels in part.axes.values():
                labeler.place(labels)  # so that every part is a group of its own and keeps something
    if _is_strided(call) and _is_mutated(call.node):
        labeler.freeze_value(value, f"a strided part of it is changed in place after {call.op}")
    return values if _several(call) else values[0]


@carries(*_CARRYING)
def always(call: Call) -> bool:
    """`move` takes grids, and settles those that the op does not leave whole."""
    del call
    return True


@spares(*PARTS, aten.flip, aten.roll)
def not_cut(call: Call, value: Value) -> Collection[int]:
    """Every axis but the one that is cut."""
    dims = call.arguments.get("dim", call.arguments.get("dims", 0))
    cut = {int(d) % len(value.shape) for d in (dims if isinstance(dims, list) else [cast(int, dims)])}
    return set(range(len(value.shape))) - cut


@spares(aten.repeat, aten.tile, aten.repeat_interleave)
def not_repeated(call: Call, value: Value) -> Collection[int]:
    """Every axis but those that are repeated."""
    if "dim" in call.arguments:
        dim = call.arguments["dim"]
        return set(range(len(value.shape))) - ({cast(int, dim) % len(value.shape)} if dim is not None else set())
    repeats = call.integers("repeats" if "repeats" in call.arguments else "dims")
    last = [repeats[k - len(value.shape)] if len(value.shape) - k <= len(repeats) else 1 for k in range(len(value.shape))]
    return [axis for axis, count in enumerate(last) if count == 1]


def _spared(call: Call, value: Value) -> Collection[int] | None:
    if _packet(call) in (aten.repeat, aten.tile, aten.repeat_interleave):
        return not_repeated(call, value)
    return not_cut(call, value) if _packet(call) in PARTS else None


def _packet(call: Call) -> object:
    return cast(torch._ops.OpOverload, call.node.target).overloadpacket


def _carry(call: Call, value: Value, labeler: Labeler) -> tuple[Value, dict[int, list[Grid]]]:
    """Grids that stay grids, by output; the value without them. One that the op tears apart settles them all."""
    if not value.grids or _packet(call) not in _CARRYING:
        return value, {}
    carried: dict[int, list[Grid]] = {}
    for grid in value.grids:
        moved = _moved(call, value, grid)
        if moved is None:
            return settle(value, labeler), {}
        for k, own in enumerate(moved):
            carried.setdefault(k, []).append(own)
    for moved_grids in carried.values():
        for grid in moved_grids:
            _fix_computed(call, grid, labeler)
    return replace(value, grids=()), carried


def _moved(call: Call, value: Value, grid: Grid) -> list[Grid] | None:
    """The grid after the op, per output; None where its axes do not stay apart."""
    shape = [1] * len(value.shape)
    for axis, size in zip(grid.axes, grid.positions.shape, strict=True):
        shape[axis] = size
    field = torch.from_numpy(grid.positions).view(shape).expand(value.shape)
    moved = []
    for result in _run(call, field):
        axes = tuple(a for a in range(result.dim()) if _varies(result, a))
        if not axes:
            return None
        positions = _over(result, axes)
        coordinates = np.unravel_index(positions, grid.split.labels.shape)
        roots = []
        for k in range(len(axes)):
            along = [r for r, c in enumerate(coordinates) if (np.diff(c, axis=k) != 0).any()]
            if len(along) != 1 or along[0] in roots:
                return None
            roots.append(along[0])
        lost = set(range(grid.split.labels.ndim)) - set(roots)
        if any(len(np.unique(coordinates[r])) > 1 for r in lost):
            return None
        moved.append(Grid(grid.split, positions, axes, tuple(roots)))
    return moved


def _fix_computed(call: Call, grid: Grid, labeler: Labeler) -> None:
    for axis, root in zip(grid.axes, grid.roots, strict=True):
        if _is_computed(call, axis):
            grid.split.fixed.add(root)
            if grid.split.chosen == root:
                labeler.freeze(grid.split.labels, f"{call.op} computes the size of their axis at run time")


def _freeze_windows(call: Call, value: Value, labeler: Labeler) -> None:
    axis = call.integer("dimension") % len(value.shape)
    if axis in value.axes:
        labeler.freeze(value.axes[axis], f"is cut into windows by {call.op}")


def _freeze_rolls(call: Call, value: Value, labeler: Labeler) -> None:
    """A roll of the flattened tensor, or twice along one axis, has no shift that could follow."""
    dims = [d % len(value.shape) for d in call.integers("dims")]
    for axis, labels in value.axes.items():
        if not dims or dims.count(axis) > 1:
            labeler.freeze(labels, f"is rolled in a way that cannot follow by {call.op}")


def _nothing(call: Call, value: Value, labeler: Labeler) -> None:
    del call, value, labeler


_FREEZES: dict[object, Callable[[Call, Value, Labeler], None]] = {aten.unfold: _freeze_windows, aten.roll: _freeze_rolls}


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
    return yields_several(call.node)


def _collect(result: Tensor, axes: dict[int, IntArray], grids: list[Grid], call: Call, labeler: Labeler) -> None:
    """Read a label field back: which axes does it vary along?"""
    varying = tuple(a for a in range(result.dim()) if _varies(result, a))
    if not varying:
        return
    labels = _over(result, varying)
    if len(varying) > 1:
        split = Split(labels, fixed={k for k, axis in enumerate(varying) if _is_computed(call, axis) or axis == 0})
        positions = np.arange(labels.size, dtype=np.int64).reshape(labels.shape)
        grids.append(Grid(split, positions, varying, tuple(range(len(varying)))))
        return
    (axis,) = varying
    if axis in axes:
        _merge(axes, axis, labels, call, labeler)
    elif _is_computed(call, axis):
        labeler.freeze(labels, f"{call.op} computes the size of their axis at run time")
    else:
        axes[axis] = labels


def _merge(axes: dict[int, IntArray], axis: int, labels: IntArray, call: Call, labeler: Labeler) -> None:
    """Two label fields along one axis: neither can shrink, unless one of them only repeats the other."""
    own = axes.pop(axis)
    for one, other in ((own, labels), (labels, own)):
        if labeler.is_blank(other):
            labeler.freeze(other, f"is merged with channels by {call.op}")
            axes[axis] = one
            return
    for one in (own, labels):
        labeler.freeze(one, f"two labelled axes are merged by {call.op}")


def _label_repeats(
    call: Call, value: Value, shape: tuple[int, ...], axes: dict[int, IntArray], grids: list[Grid], labeler: Labeler
) -> None:
    """An expanded axis only repeats, so it may be as long as whatever it meets."""
    if _packet(call) not in (aten.expand, aten.broadcast_to, aten.repeat):
        return
    taken = {axis for grid in grids for axis in grid.axes}
    offset = len(shape) - len(value.shape)
    for axis in range(1, len(shape)):
        before = value.shape[axis - offset] if axis >= offset else 1
        if before == 1 and shape[axis] > 1 and axis not in axes and axis not in taken and not _is_computed(call, axis):
            axes[axis] = labeler.blanks(shape[axis])


def _is_computed(call: Call, axis: int) -> bool:
    """Whether an op gives the size of an axis as a value of the graph, so that it cannot be edited.

    A view that computes the size of one axis beside the batch (batch * heads) may leave it to be inferred.
    """
    if _packet(call) not in (*VIEWS, aten.expand, aten.broadcast_to, aten.repeat):
        return False
    sizes = cast(Sequence[object], call.node.args[1])
    if not isinstance(sizes[axis], fx.Node):
        return False
    others = [size for k, size in enumerate(sizes) if k > 0 and k != axis and (isinstance(size, fx.Node) or size == -1)]
    return axis == 0 or bool(others) or sizes[0] == -1 or _packet(call) not in VIEWS


def _varies(field: Tensor, axis: int) -> bool:
    if field.shape[axis] <= 1 or field.stride(axis) == 0:
        return False
    return not torch.equal(
        field.narrow(axis, 1, field.shape[axis] - 1),
        field.narrow(axis, 0, 1).expand_as(field.narrow(axis, 1, field.shape[axis] - 1)),
    )


def _over(field: Tensor, varying: Sequence[int]) -> IntArray:
    """The field over the axes that it varies along, as numpy."""
    index = tuple(slice(None) if a in varying else 0 for a in range(field.dim()))
    return cast(IntArray, field[index].contiguous().numpy())


def _freeze_lone(results: list[Tensor], call: Call, labeler: Labeler) -> None:
    """A channel that ends up alone (picked by its index, a slice of length 1) has to stay."""
    for result in results:
        if result.numel() and not any(_varies(result, a) for a in range(result.dim())):
            labeler.freeze(result.reshape(-1)[:1].numpy(), f"is picked alone by {call.op}")


@rule(aten.view_as, aten.reshape_as)
def shaped_like(call: Call, labeler: Labeler) -> Value:
    """A view to the shape of another tensor, which says at run time what that is."""
    x, other = call.values
    axes: dict[int, IntArray] = {}
    grids: list[Grid] = []
    for axis, labels in x.axes.items():
        shape = [1] * len(x.shape)
        shape[axis] = len(labels)
        result = torch.from_numpy(labels).view(shape).expand(x.shape).reshape(call.outputs[0])
        _collect(result, axes, grids, call, labeler)
    value = settle(Value(call.outputs[0], axes, x.why, grids=tuple(grids)), labeler, set(other.axes))
    return meet([value, other], call.outputs[0], call.op, labeler)
