"""Element-wise ops: labels that meet at one position are tied, with broadcasting."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import nn

from compressor.passes.labels.labeler import IntArray, Labeler, Value
from compressor.passes.labels.rules.base import Call, carries, rule, spares

aten = torch.ops.aten


ELEMENTWISE = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    aten.relu, aten.relu_, aten.relu6, aten.relu6_, aten.sigmoid, aten.sigmoid_, aten.tanh, aten.tanh_,
    aten.silu, aten.silu_, aten.gelu, aten.gelu_, aten.mish, aten.mish_, aten.elu, aten.elu_, aten.celu, aten.celu_,
    aten.selu, aten.selu_, aten.leaky_relu, aten.leaky_relu_, aten.hardtanh, aten.hardtanh_, aten.hardswish,
    aten.hardswish_, aten.hardsigmoid, aten.hardsigmoid_, aten.softplus, aten.log_sigmoid, aten.hardshrink,
    aten.softshrink, aten.threshold, aten.threshold_, aten.rrelu,
    aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub, aten.mul, aten.mul_, aten.div, aten.div_, aten.pow, aten.pow_,
    aten.maximum, aten.minimum, aten.fmod, aten.remainder, aten.atan2, aten.lerp, aten.addcmul, aten.addcdiv,
    aten.neg, aten.abs, aten.exp, aten.exp_, aten.expm1, aten.log, aten.log2, aten.log1p, aten.sqrt, aten.rsqrt,
    aten.square, aten.reciprocal, aten.sign, aten.sin, aten.cos, aten.erf, aten.floor, aten.ceil, aten.round,
    aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.clamp_max, aten.where, aten.masked_fill,
    aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.logical_and, aten.logical_or, aten.logical_not,
    aten.clone, aten.contiguous, aten.detach, aten.detach_, aten.alias, aten.to, aten._to_copy,
    aten.lift_fresh_copy, aten.expand_as, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout,
    aten.nan_to_num, aten.logaddexp, aten.tan, aten.asinh, aten.isnan, aten.bitwise_not, aten.trunc,
    aten.hypot, aten.logit, aten.true_divide, aten.floor_divide, aten.positive, aten.sgn, aten.erf_, aten.addcmul_, aten.clamp_max_,
    aten.sqrt_, aten.neg_, aten.abs_, aten.masked_fill_, aten.zero_, aten.fill_, aten.fill,
    aten.copy_, aten.clip, aten.multiply, aten.subtract, aten.divide, aten.absolute, aten.empty_like,
)  # fmt: skip


def meet(values: Sequence[Value], shape: tuple[int, ...], where: str, labeler: Labeler) -> Value:
    """Tie what `values` carry at the same position of a broadcast result of `shape`.

    A tensor that is longer than 1 along an axis but carries no labels there cannot be narrowed, so it
    freezes the labels that it meets.
    """
    axes: dict[int, IntArray] = {}
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        bare: Value | None = None
        for value in values:
            own = axis - (len(shape) - len(value.shape))
            if own < 0 or value.shape[own] == 1:
                continue
            labels = value.axes.get(own)
            if labels is None:
                bare = value
            elif axis in axes:
                labeler.tie(axes[axis], labels)
                axes[axis] = labels if labeler.is_blank(axes[axis]) else axes[axis]
            else:
                axes[axis] = labels
        if bare is not None and axis in axes:
            labeler.freeze(axes[axis], f"meets {bare.why or 'a tensor without channels'} in {where}")
    why = next((v.why for v in values if v.why), "")
    return Value(shape, axes, why)


@rule(*ELEMENTWISE)
def elementwise(call: Call, labeler: Labeler) -> Value:
    """One result from tensors of broadcast shapes."""
    shape = call.outputs[0]
    result = meet([replace(value, grids=()) for value in call.values], shape, call.op, labeler)
    grids = tuple(
        replace(grid, axes=tuple(axis + len(shape) - len(value.shape) for axis in grid.axes))
        for value in call.values
        for grid in value.grids
    )
    return replace(result, grids=grids)


@carries(*ELEMENTWISE)
def meets_nothing(call: Call) -> bool:
    """Channels spread over several axes stay so as long as nothing else lies along those axes."""
    values = call.values
    shape = call.outputs[0]
    for value in values:
        spread = {axis - len(value.shape) for grid in value.grids for axis in grid.axes}
        for other in values:
            if other is not value and any(-axis <= len(other.shape) and other.shape[axis] > 1 for axis in spread):
                return False
    return all(value.shape == shape for value in values if value.grids)


@spares(*ELEMENTWISE)
def labelled_elsewhere(call: Call, value: Value) -> Collection[int]:
    """The axes along which another tensor lies and can follow; where there is none, those along which none lies at all."""
    free, met = set(), set()
    for axis in range(len(value.shape)):
        back = axis - len(value.shape)
        others = [o for o in call.values if o is not value and -back <= len(o.shape) and o.shape[back] > 1]
        if all(len(o.shape) + back in o.axes or any(len(o.shape) + back in g.axes for g in o.grids) for o in others):
            free.add(axis)
            if others:
                met.add(axis)
    return met or free


@rule(aten.type_as)
def type_as(call: Call, labeler: Labeler) -> Value:
    """Only the type comes from the other tensor."""
    return meet([call.tensor("self")], call.outputs[0], call.op, labeler)


@rule(aten.prelu)
def prelu(call: Call, labeler: Labeler) -> Value:
    """A slope per channel: the weight lies along axis 1, whatever the rank of the input."""
    x, weight = call.tensor("self"), call.tensor("weight")
    lifted = Value((weight.shape[0], *[1] * (len(x.shape) - 2)), weight.axes, weight.why)
    return meet([x, lifted], call.outputs[0], call.op, labeler)


@rule(aten.glu)
def glu(call: Call, labeler: Labeler) -> Value:
    """The first half of an axis is gated by the second half: the halves are tied."""
    x = call.tensor("self")
    axis = call.integer("dim") % len(x.shape)
    axes = dict(x.axes)
    if axis in axes:
        first, second = axes[axis].reshape(2, -1)
        labeler.tie(first, second)
        axes[axis] = first
    return Value(call.outputs[0], axes, x.why)
