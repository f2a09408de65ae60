"""Normalisers: channels pass through and their parameters are tied to them.

Batch and instance norm treat each channel by itself: exact. A layer norm over channels computes its
statistics from all of them: lossy, they are then computed over what stays. A group norm is exact as long
as whole blocks go.
"""

from collections.abc import Collection
from typing import cast

import torch
from torch import fx, nn

from compressor.passes.labels.labeler import Labeler, Value
from compressor.passes.labels.rules.base import Call, Change, edit, key_of, rule, spares
from compressor.passes.labels.rules.elementwise import meet

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
                labeler.lose(labels, call.op, call.node.name)
                labeler.need(labels, 2, call.op)
    return _with_parameters(call, labeler)


@rule(nn.GroupNorm, aten.group_norm)
def group_norm(call: Call, labeler: Labeler) -> Value:
    """Statistics per block of channels: a block stays or goes as a whole, and the number of blocks follows.

    A single block over all channels is a layer norm by another name. Where a grouped convolution needs the
    blocks themselves, each of them shrinks instead (`Labeler.block`).
    """
    x = call.tensor("input")
    if 1 in x.axes:
        blocks = x.axes[1].reshape(call.integer("num_groups"), -1)
        if len(blocks) == 1:
            labeler.lose(blocks, call.op, call.node.name)
        else:
            labeler.block(blocks, call.op, call.node.name)
    for axis, labels in x.axes.items():
        if axis > 1:
            labeler.lose(labels, call.op, call.node.name)
    return _with_parameters(call, labeler)


@edit(nn.GroupNorm, aten.group_norm)
def group_norm_blocks(change: Change) -> None:
    """As many blocks as have any channel left."""
    blocks = int(change.kept(change.inputs, 1).reshape(change.call.integer("num_groups"), -1).any(axis=1).sum())
    if change.node.op == "call_module":
        owner = cast(fx.GraphModule, change.node.graph.owning_module)
        cast(nn.GroupNorm, owner.get_submodule(str(change.node.target))).num_groups = blocks
    else:
        change.node.update_arg(1, blocks)


@rule(nn.LayerNorm, nn.RMSNorm, aten.layer_norm, aten.rms_norm)
def layer_norm(call: Call, labeler: Labeler) -> Value:
    """Statistics over the last axes: channels along them are lossy."""
    x = call.tensor("input")
    rank = len(call.integers("normalized_shape"))
    for axis, labels in x.axes.items():
        if axis >= len(x.shape) - rank:
            labeler.lose(labels, call.op, call.node.name)
    parameters = [v for name in ("weight", "bias") if (v := call.optional(name)) is not None]
    return meet([x, *parameters], call.outputs[0], call.op, labeler)


@spares(nn.LayerNorm, nn.RMSNorm, aten.layer_norm, aten.rms_norm)
def not_normalized(call: Call, value: Value) -> Collection[int]:
    """The axes before those that are normalised."""
    return range(len(value.shape) - len(call.integers("normalized_shape")))


@edit(aten.layer_norm, aten.rms_norm)
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
