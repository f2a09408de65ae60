"""Normalisers: channels pass through and their parameters are tied to them.

Batch and instance norm treat each channel by itself: exact. A layer norm over channels computes its
statistics from all of them: lossy. A group norm is exact as long as whole blocks go.
"""

from typing import cast

import torch
from torch import nn

from compressor.passes.labels import Labeler, Value
from compressor.passes.rules.base import Call, Change, edit, key_of, rule
from compressor.passes.rules.elementwise import meet

aten = torch.ops.aten

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


@rule(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    aten.batch_norm, aten.instance_norm,
)  # fmt: skip
def per_channel_norm(call: Call, labeler: Labeler) -> Value:
    """Statistics per channel (axis 1)."""
    weight, x = call.optional("weight"), call.tensor("input")
    if weight is not None:
        labeler.scale(weight.name)
    over_batch = isinstance(call.module, nn.modules.batchnorm._BatchNorm) or key_of(call.node, None) is aten.batch_norm
    if not over_batch or call.optional("running_mean") is None or call.arguments.get("training"):
        for axis, labels in x.axes.items():
            if axis > 1 or (axis == 0 and over_batch):
                labeler.lose(labels, call.op)
    return _with_parameters(call, labeler)


@rule(nn.GroupNorm, aten.group_norm)
def group_norm(call: Call, labeler: Labeler) -> Value:
    """Statistics per block of channels: a block stays or goes as a whole, and the number of blocks follows."""
    x = call.tensor("input")
    if 1 in x.axes:
        blocks = x.axes[1].reshape(call.integer("num_groups"), -1)
        for column in range(1, blocks.shape[1]):
            labeler.tie(blocks[:, 0], blocks[:, column])
        if len(blocks) == 1:
            labeler.freeze(blocks, f"{call.op} normalises over all of them as one block")
    for axis, labels in x.axes.items():
        if axis > 1:
            labeler.lose(labels, call.op)
    return _with_parameters(call, labeler)


@edit(aten.group_norm)
def group_norm_blocks(change: Change) -> None:
    """As many blocks as are left."""
    size = change.inputs.shape[1] // change.call.integer("num_groups")
    change.node.update_arg(1, change.size(change.inputs, 1) // size)


@rule(nn.LayerNorm, aten.layer_norm)
def layer_norm(call: Call, labeler: Labeler) -> Value:
    """Statistics over the last axes: channels along them are lossy."""
    x = call.tensor("input")
    rank = len(call.integers("normalized_shape"))
    for axis, labels in x.axes.items():
        if axis >= len(x.shape) - rank:
            labeler.lose(labels, call.op)
    parameters = [v for name in ("weight", "bias") if (v := call.optional(name)) is not None]
    return meet([x, *parameters], call.outputs[0], call.op, labeler)


@edit(aten.layer_norm)
def normalized_shape(change: Change) -> None:
    """The shape that the statistics are computed over."""
    shape = list(cast(list[int], change.node.args[1]))
    first = len(change.inputs.shape) - len(shape)
    change.node.update_arg(1, [change.size(change.inputs, first + k) for k in range(len(shape))])


def _with_parameters(call: Call, labeler: Labeler) -> Value:
    x = call.tensor("input")
    values = [x]
    for name in _PER_CHANNEL:
        parameter = call.optional(name)
        if parameter is not None:
            values.append(Value((parameter.shape[0], *[1] * (len(x.shape) - 2)), parameter.axes, parameter.why, parameter.name))
    return meet(values, call.outputs[0], call.op, labeler)
