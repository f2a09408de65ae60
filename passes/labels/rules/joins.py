"""Joins: labels of several tensors follow one another (cat), meet (stack), or are surrounded by blanks (pad)."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import fx

from compressor.passes.labels.labeler import IntArray, Labeler, Value
from compressor.passes.labels.rules.base import Call, Change, edit, rule

aten = torch.ops.aten


@rule(aten.cat, aten.concat, aten.concatenate)
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
            axes[axis] = np.concatenate([labeler.blanks(before), labels, labeler.blanks(after)])
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
