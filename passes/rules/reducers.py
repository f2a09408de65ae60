"""Reducers and poolings: axes that are not reduced keep their labels.

Summing over channels is exact under removal (a removed channel added nothing once it is masked); a mean,
a maximum or a softmax over channels is not: such channels are *lossy*.
"""

import re
from typing import cast

import torch

from compressor.passes.labels import IntArray, Labeler, Value
from compressor.passes.rules.base import Call, rule
from compressor.passes.rules.elementwise import elementwise

aten = torch.ops.aten


@rule(
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices,
    aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d, aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten.max_pool1d_with_indices,
)  # fmt: skip
def spatial(call: Call, labeler: Labeler) -> Value | list[Value]:
    """Works on each channel by itself: the last axes (1, 2 or 3, by the op) are spatial, labels there are frozen."""
    (x,) = call.values
    match = re.search(r"([123])d", str(call.node.target))
    first = len(x.shape) - int(match.group(1) if match else 1)
    axes = {axis: labels for axis, labels in x.axes.items() if axis < first}
    for axis, labels in x.axes.items():
        if axis >= first:
            labeler.freeze(labels, f"lies along a spatial axis of {call.op}")
    values = [Value(shape, axes, x.why) for shape in call.outputs]
    return values if isinstance(call.node.meta.get("val"), list | tuple) else values[0]


@rule(aten.sum)
def summation(call: Call, labeler: Labeler) -> Value:
    """Exact over channels: what is removed added nothing."""
    x = call.tensor("self")
    for axis in _reduced(call, x) & set(x.axes):
        labeler.consume(x.axes[axis], call.layer)
    return _reduce(call, x)


@rule(
    aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean, aten.std_mean,
    aten.prod, aten.logsumexp, aten.linalg_vector_norm, aten.norm, aten.argmax, aten.argmin, aten.any, aten.all,
)  # fmt: skip
def statistic(call: Call, labeler: Labeler) -> Value | list[Value]:
    """Over channels these depend on how many there are, or on what the removed ones held."""
    if len(call.values) > 1:  # aten.max(x, y) is element-wise
        return elementwise(call, labeler)
    (x,) = call.values
    for axis in _reduced(call, x) & set(x.axes):
        labeler.lose(x.axes[axis], call.op)
    value = _reduce(call, x)
    if isinstance(call.node.meta.get("val"), list | tuple):
        return [value] * len(call.outputs)
    return value


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum)
def along_axis(call: Call, labeler: Labeler) -> Value:
    """Element-wise but for one axis, along which every element depends on every other."""
    x = call.tensor("self")
    axis = call.integer("dim") % len(x.shape)
    if axis in x.axes:
        labeler.lose(x.axes[axis], call.op)
    return Value(call.outputs[0], x.axes, x.why)


def _reduced(call: Call, x: Value) -> set[int]:
    """The axes that are reduced; all of them where none is named."""
    dims = call.arguments.get("dim")
    if dims is None:
        return set(range(len(x.shape)))
    listed = dims if isinstance(dims, list | tuple) else [cast(int, dims)]
    return {int(d) % len(x.shape) for d in listed} or set(range(len(x.shape)))


def _reduce(call: Call, x: Value) -> Value:
    reduced = _reduced(call, x)
    keep = len(call.outputs[0]) == len(x.shape)
    axes: dict[int, IntArray] = {}
    for axis, labels in x.axes.items():
        if axis not in reduced:
            axes[axis if keep else axis - sum(r < axis for r in reduced)] = labels
    return Value(call.outputs[0], axes, x.why)
