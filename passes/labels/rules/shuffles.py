"""Shuffles: ops that change the order of channels by a rule of their own."""

import torch

from compressor.passes.labels.labeler import Labeler, Value
from compressor.passes.labels.rules.base import Call, rule

aten = torch.ops.aten


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
