"""Mixers: conv, linear and matmul end the labels of the axis they contract and start fresh ones."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from compressor.passes.labels.labeler import IntArray, Labeler, Slot, Value
from compressor.passes.labels.rules.base import Call, Change, edit, rule, spares
from compressor.passes.labels.rules.elementwise import meet

aten = torch.ops.aten

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, aten.conv1d, aten.conv2d, aten.conv3d)
_TRANSPOSED = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
)  # fmt: skip


@rule(*_CONVS)
def convolution(call: Call, labeler: Labeler) -> Value:
    """Weight (outputs, inputs / groups, kernel…): plain, grouped or depthwise."""
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.integer("groups")
    inputs = _channels(x, 1, call, labeler)
    _freeze_kernel(weight, call, labeler)
    outputs = weight.axes.get(0)
    windows = _windows(x, call, labeler)
    folded = call.outputs[0][0] // call.batch  # a view may have put more than the batch into axis 0
    places = [size for axis, size in enumerate(call.outputs[0]) if axis > 1 and axis not in windows]
    positions = max(folded, 1) * math.prod(places) * math.prod(weight.shape[2:])
    if outputs is None and weight.shape[0] > 1:
        labeler.freeze(inputs, f"the weight of {call.op} is not understood")
    reads = _tie_inputs(call, weight, inputs, groups, 1, labeler)
    factors = [reads]
    if outputs is not None:
        labeler.produce(outputs, call.layer, weight.name, 0)
        _tie_bias(call, outputs, labeler)
        if groups > 1 and weight.shape[1] == 1:  # depthwise: each input makes `multiplier` outputs
            labeler.tie(outputs, inputs.repeat(weight.shape[0] // groups))
        elif groups > 1:
            labeler.keep_regular(outputs.reshape(groups, -1), call.op)
        factors.append((outputs, 1))
    if outputs is None:
        positions *= weight.shape[0]
    labeler.spend(call.layer, positions, *factors, *[(labels, 1) for labels in windows.values()])
    return Value(call.outputs[0], windows if outputs is None else {**windows, 1: outputs})


@rule(*_TRANSPOSED)
def transposed_convolution(call: Call, labeler: Labeler) -> Value:
    """Weight (inputs, outputs / groups, kernel…)."""
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.integer("groups")
    inputs = _channels(x, 1, call, labeler)
    _freeze_kernel(weight, call, labeler)
    _freeze_spatial(x, call, labeler)
    positions = max(x.shape[0] // call.batch, 1) * math.prod(x.shape[2:]) * math.prod(weight.shape[2:])
    own = weight.axes.get(0)
    if own is not None:
        labeler.tie(own, inputs)
    elif len(inputs) > 1:
        labeler.freeze(inputs, f"the weight of {call.op} is not understood")
    labeler.consume(inputs, call.layer)
    per_block = weight.shape[1]
    outputs = labeler.fresh(call.outputs[0][1])
    per_input: tuple[IntArray, int] = (outputs, groups)
    if groups == 1:
        if 1 in weight.axes:
            labeler.tie(weight.axes[1], outputs)
        elif per_block > 1:
            labeler.freeze(outputs, f"the weight of {call.op} is not understood")
    elif weight.shape[0] == groups:  # depthwise: a whole block of outputs goes with its one input
        labeler.tie(outputs, inputs.repeat(per_block))
        own = weight.axes.get(1, labeler.fresh(1))
        labeler.freeze(own, f"every input of {call.op} has the same number of outputs")
        per_input = (own, 1)
    elif weight.name:
        labeler.keep_regular(inputs.reshape(groups, -1), call.op)
        labeler.keep_regular(outputs.reshape(groups, -1), call.op)
        labeler.block_slot(Slot(weight.name, 1, outputs, groups))
    else:
        labeler.freeze(np.concatenate([inputs, outputs]), f"the weight of the grouped {call.op} is computed")
    labeler.produce(outputs, call.layer, weight.name, 1)
    _tie_bias(call, outputs, labeler)
    labeler.spend(call.layer, positions, (inputs, 1), per_input)
    return Value(call.outputs[0], {1: outputs} if call.outputs[0][1] > 1 else {})


@rule(nn.Linear, aten.linear)
def linear(call: Call, labeler: Labeler) -> Value:
    """Contracts the last axis; every other axis passes through."""
    x, weight = call.tensor("input"), call.tensor("weight")
    last = len(x.shape) - 1
    inputs = _channels(x, last, call, labeler)
    reads = _tie_inputs(call, weight, inputs, 1, 1, labeler)
    axes = {axis: labels for axis, labels in x.axes.items() if axis != last}
    outputs = weight.axes.get(0)
    factors = [reads]
    if outputs is not None:
        labeler.produce(outputs, call.layer, weight.name, 0)
        _tie_bias(call, outputs, labeler)
        factors.append((outputs, 1))
        axes[last] = outputs
    constant, positions = per_sample(call, x.shape[:-1], {axis: own for axis, own in axes.items() if axis != last})
    labeler.spend(call.layer, constant, *positions, *factors)
    return Value(call.outputs[0], axes)


@rule(aten.matmul, aten.bmm, aten.mm)
def matmul(call: Call, labeler: Labeler) -> Value:
    """(…, m, k) by (…, k, n): ties the two contracted axes; batch axes meet."""
    left, right = call.values
    return _product(left, right, call, labeler)


@rule(aten.addmm, aten.baddbmm)
def matmul_added(call: Call, labeler: Labeler) -> Value:
    """A product of matrices, and something that is added to it."""
    added, left, right = call.values
    return meet([_product(left, right, call, labeler), added], call.outputs[0], call.op, labeler)


def _product(left: Value, right: Value, call: Call, labeler: Labeler) -> Value:
    if min(len(left.shape), len(right.shape)) < 2:
        for value in (left, right):
            labeler.freeze_value(value, f"a product with a vector in {call.op}")
        return Value(call.outputs[0], why=f"the output of {call.op}")
    a, b = left.axes.get(len(left.shape) - 1), right.axes.get(len(right.shape) - 2)
    for labels, other in ((a, b), (b, a)):
        if labels is not None and other is None:
            labeler.freeze(labels, f"is contracted with an axis without channels in {call.op}")
    if a is not None and b is not None:
        labeler.tie(a, b)
    for labels in (a, b):
        if labels is not None:
            labeler.consume(labels, call.layer)
    columns_axis = len(right.shape) - 1
    if right.name and columns_axis in right.axes:  # a stored matrix is a layer by another name
        labeler.produce(right.axes[columns_axis], call.layer, right.name, columns_axis)
    rows = Value((*left.shape[:-1], 1), {k: v for k, v in left.axes.items() if k != len(left.shape) - 1}, left.why)
    columns = Value(
        (*right.shape[:-2], 1, right.shape[-1]), {k: v for k, v in right.axes.items() if k != len(right.shape) - 2}, right.why
    )
    result = meet([rows, columns], call.outputs[0], call.op, labeler)
    constant, factors = per_sample(call, call.outputs[0], result.axes)
    contracted = a if a is not None else b
    if contracted is None:
        constant *= left.shape[-1]
    else:
        factors.append((contracted, 1))
    labeler.spend(call.layer, constant, *factors)
    return result


def per_sample(call: Call, shape: Sequence[int], axes: Mapping[int, IntArray]) -> tuple[int, list[tuple[IntArray, int]]]:
    """Positions of a tensor for one sample: a constant, and a factor per labelled axis.

    Where a view has put batch and heads into one labelled axis, its factor is divided by the batch.
    """
    constant = math.prod(size for axis, size in enumerate(shape) if axis not in axes)
    factors = [(labels, 1) for labels in axes.values()]
    if 0 in axes and len(axes[0]) % call.batch == 0:
        factors[list(axes).index(0)] = (axes[0], call.batch)
        return constant, factors
    return max(constant // call.batch, 1), factors


@spares(nn.Linear, aten.linear)
def not_contracted(call: Call, value: Value) -> Collection[int]:
    """Every axis but the last."""
    del call
    return range(len(value.shape) - 1)


@edit(aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def depthwise_groups(change: Change) -> None:
    """A functional depthwise conv has as many groups as channels that are left."""
    groups = change.call.integer("groups")
    inputs = change.call.tensor("input")
    if groups > 1 and inputs.shape[1] == groups:
        change.set(6, "groups", change.size(inputs, 1))


def _channels(x: Value, axis: int, call: Call, labeler: Labeler) -> IntArray:
    """Labels of the axis that is contracted; frozen ones where it carries none."""
    labels = x.axes.get(axis)
    if labels is None:
        labels = labeler.fresh(x.shape[axis])
        labeler.freeze(labels, f"{call.op} reads {x.why or 'an axis without channels'}")
    return labels


def _windows(x: Value, call: Call, labeler: Labeler) -> dict[int, IntArray]:
    """Channels along a spatial axis: a gate over neighbouring channels (ECA) is computed over those that stay; else frozen.

    That takes a stride of 1, a padding that keeps the length, and nothing to narrow along the other axes.
    """
    gate = x.shape[1] == 1 and call.outputs[0][1] == 1 and len(x.shape) == 3
    stride = getattr(call.module, "stride", None) or call.integers("stride")
    if gate and 2 in x.axes and call.outputs[0][2] == x.shape[2] and set(stride) == {1}:
        labeler.lose(x.axes[2], call.op, call.node.name)
        return {2: x.axes[2]}
    _freeze_spatial(x, call, labeler)
    return {}


def _freeze_spatial(x: Value, call: Call, labeler: Labeler) -> None:
    """A convolution's batch and spatial axes cannot shrink."""
    for axis, labels in x.axes.items():
        if axis != 1:
            labeler.freeze(labels, f"lies along the batch or a spatial axis of {call.op}")


def _freeze_kernel(weight: Value, call: Call, labeler: Labeler) -> None:
    """The taps of a kernel are no channels, whatever computes the weight: with fewer of them the padding would be wrong."""
    for axis, labels in weight.axes.items():
        if axis > 1:
            labeler.freeze(labels, f"lies along the kernel of {call.op}")


def _tie_inputs(call: Call, weight: Value, inputs: IntArray, groups: int, axis: int, labeler: Labeler) -> tuple[IntArray, int]:
    """Tie a weight's input axis to what it reads; returns the cost factor of that axis."""
    labeler.consume(inputs, call.layer)
    own = weight.axes.get(axis)
    if groups == 1:
        if own is None and len(inputs) > 1:
            labeler.freeze(inputs, f"the weight of {call.op} is not understood")
        elif own is not None:
            labeler.tie(own, inputs)
        return inputs, 1
    if weight.shape[axis] == 1:
        return labeler.fresh(1), 1  # depthwise: one input per output, always
    if weight.name:
        labeler.keep_regular(inputs.reshape(groups, -1), call.op)
        labeler.block_slot(Slot(weight.name, axis, inputs, groups))
    elif own is None:
        labeler.freeze(inputs, f"the weight of {call.op} is not understood")
    else:  # a computed weight keeps the same positions of every block
        labeler.tie(np.tile(own, groups), inputs)
    return inputs, groups


def _tie_bias(call: Call, outputs: IntArray, labeler: Labeler) -> None:
    bias = call.optional("bias")
    if bias is not None and bias.shape[0] > 1:
        own = bias.axes.get(0)
        if own is None:
            labeler.freeze(outputs, f"the bias of {call.op} is not understood")
        else:
            labeler.tie(own, outputs)
