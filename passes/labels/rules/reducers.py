"""Reducers and poolings: axes that are not reduced keep their labels.

Summing over channels is exact under removal (a removed channel added nothing once it is masked); a mean,
a maximum or a softmax over channels is not: such channels are *lossy*, what is computed from them is then
computed over those that stay.
"""

import re
from collections.abc import Collection
from typing import cast

import numpy as np
import torch

from compressor.passes.labels.labeler import IntArray, Labeler, Value
from compressor.passes.labels.rules.base import Call, key_of, rule, spares
from compressor.passes.labels.rules.elementwise import elementwise
from compressor.passes.tracing.shapes import yields_several

aten = torch.ops.aten


@rule(
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices,
    aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d, aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten.max_pool1d_with_indices, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
)  # fmt: skip
def spatial(call: Call, labeler: Labeler) -> Value | list[Value]:
    """Works on each channel by itself: the last axes (1, 2 or 3, by the op) are spatial, labels there are frozen."""
    (x,) = call.values
    match = re.search(r"([123])d", str(call.node.target))
    first = len(x.shape) - int(match.group(1) if match else 1)
    axes = {axis: labels for axis, labels in x.axes.items() if axis < first}
    for axis, labels in x.axes.items():
        if axis < first:
            continue
        centre = _centre(call, axis - first, labels)
        if centre is None:
            labeler.freeze(labels, f"lies along a spatial axis of {call.op}")
        else:  # local response normalisation: an average over neighbouring channels
            labeler.lose(labels, call.op, call.node.name)
            edges = labels[~np.isin(labels, centre)]
            labeler.freeze(edges, f"lies at the edge of what {call.op} averages over")
            axes[axis] = centre
    values = [Value(shape, axes, x.why) for shape in call.outputs]
    return values if yields_several(call.node) else values[0]


def _centre(call: Call, k: int, labels: IntArray) -> IntArray | None:
    """Labels after an average over windows of neighbours along the k-th spatial axis; None where it is anything else."""
    if key_of(call.node, None) not in (aten.avg_pool2d, aten.avg_pool3d):
        return None
    size = call.integers("kernel_size")
    stride, padding = (call.integers(name) or size for name in ("stride", "padding"))
    if stride[k % len(stride)] != 1 or any(padding):
        return None
    return labels[size[k] // 2 : len(labels) - (size[k] - 1) // 2]


@rule(aten.grid_sampler)
def sampled(call: Call, labeler: Labeler) -> Value:
    """Samples every channel at the same places."""
    x, grid = call.tensor("input"), call.tensor("grid")
    for value, first in ((x, 2), (grid, 0)):
        for axis, labels in value.axes.items():
            if axis >= first:
                labeler.freeze(labels, f"says where or is where {call.op} samples")
    return Value(call.outputs[0], {1: x.axes[1]} if 1 in x.axes else {}, x.why)


@rule(aten.sum)
def summation(call: Call, labeler: Labeler) -> Value:
    """Exact over channels: what is removed added nothing."""
    x = call.tensor("self")
    for axis in _reduced(call, x) & set(x.axes):
        labeler.consume(x.axes[axis], call.layer)
    return _reduce(call, x)


@rule(
    aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean, aten.std_mean,
    aten.prod, aten.logsumexp, aten.linalg_vector_norm, aten.norm, aten.any, aten.all,
)  # fmt: skip
def statistic(call: Call, labeler: Labeler) -> Value | list[Value]:
    """Over channels these depend on how many there are, or on what the removed ones held."""
    if len(call.values) > 1:  # aten.max(x, y) is element-wise
        return elementwise(call, labeler)
    (x,) = call.values
    for axis in _reduced(call, x) & set(x.axes):
        labeler.lose(x.axes[axis], call.op, call.node.name)
        if key_of(call.node, None) in (aten.var, aten.std, aten.var_mean, aten.std_mean):
            labeler.need(x.axes[axis], 2, call.op)
    value = _reduce(call, x)
    if yields_several(call.node):
        return [value] * len(call.outputs)
    return value


@rule(aten.argmax, aten.argmin)
def position(call: Call, labeler: Labeler) -> Value:
    """The result is a position, which removal would shift: the axis stays as it is."""
    (x,) = call.values
    for axis in _reduced(call, x) & set(x.axes):
        labeler.freeze(x.axes[axis], f"is counted through by {call.op}")
    return _reduce(call, x)


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum)
def along_axis(call: Call, labeler: Labeler) -> Value:
    """Element-wise but for one axis, along which every element depends on every other."""
    x = call.tensor("self")
    axis = call.integer("dim") % len(x.shape)
    if axis in x.axes:
        labeler.lose(x.axes[axis], call.op, call.node.name)
    return Value(call.outputs[0], x.axes, x.why)


@spares(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean, aten.std_mean,
    aten.prod, aten.logsumexp, aten.linalg_vector_norm, aten.norm, aten.softmax, aten._softmax, aten.log_softmax,
    aten._log_softmax, aten.argmax, aten.argmin, aten.cumsum,
)  # fmt: skip
def not_reduced(call: Call, value: Value) -> Collection[int]:
    """Every axis but those that are reduced or normalised."""
    return set(range(len(value.shape))) - (_reduced(call, value) if len(call.values) == 1 else set())


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
