"""Attention and einsum: products of several tensors whose axes are matched by place or by letter.

Heads are batch axes of these products: channels that come spread over (heads, features) go by whole heads.
"""

import math
from collections.abc import Collection

import torch

from compressor.passes.labels.labeler import IntArray, Labeler, Value
from compressor.passes.labels.rules.base import Call, Change, edit, rule, spares
from compressor.passes.labels.rules.elementwise import meet
from compressor.passes.labels.rules.mixers import per_sample

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention)
def scaled_dot_product_attention(call: Call, labeler: Labeler) -> Value:
    """Query (…, L, E), key (…, S, E), value (…, S, F) -> (…, L, F), a softmax over S in between."""
    query, key, value = call.tensor("query"), _shared(call, "key"), _shared(call, "value")
    shape = call.outputs[0]
    features = _matched(query, -1, key, -1, call, labeler)
    for tensor in (key, value):
        tokens = tensor.axes.get(len(tensor.shape) - 2)
        if tokens is not None:
            labeler.freeze(tokens, f"is attended to by {call.op}")
    meet([_without(query, -1), _without(key, -1, -2), _without(value, -2)], shape, call.op, labeler)
    result = meet([_without(query, -1), _without(value, -2)], shape, call.op, labeler)
    mask = call.optional("attn_mask")
    if mask is not None:
        meet([_without(query, -1), mask], (*shape[:-1], key.shape[-2]), call.op, labeler)
    constant, shared = per_sample(call, shape[:-1], {axis: own for axis, own in result.axes.items() if axis < len(shape) - 1})
    for own, size in ((features, query.shape[-1]), (value.axes.get(len(value.shape) - 1), shape[-1])):
        positions = constant * key.shape[-2] * (size if own is None else 1)
        labeler.spend(call.layer, positions, *shared, *([] if own is None else [(own, 1)]))
    return result


def _shared(call: Call, name: str) -> Value:
    """Key or value with as many heads as the query: grouped queries (`enable_gqa`) repeat them."""
    value, heads = call.tensor(name), call.tensor("query").shape[-3:-2]
    axis = len(value.shape) - 3
    if not call.arguments.get("enable_gqa") or axis < 0 or value.shape[axis] == heads[0]:
        return value
    times = heads[0] // value.shape[axis]
    axes = {a: labels.repeat(times) if a == axis else labels for a, labels in value.axes.items()}
    return Value((*value.shape[:axis], heads[0], *value.shape[axis + 1 :]), axes, value.why)


@spares(aten.scaled_dot_product_attention, aten.matmul, aten.bmm, aten.baddbmm)
def heads(call: Call, value: Value) -> Collection[int]:
    """The batch axes of a product of matrices."""
    del call
    return range(len(value.shape) - 2)


@edit(aten.scaled_dot_product_attention)
def attention_scale(change: Change) -> None:
    """The scale follows the number of features unless it is given: give it."""
    query = change.call.tensor("query")
    if change.call.arguments.get("scale") is None and not change.unchanged(query, len(query.shape) - 1):
        change.node.kwargs = {**change.node.kwargs, "scale": query.shape[-1] ** -0.5}


@rule(aten.einsum)
def einsum(call: Call, labeler: Labeler) -> Value:
    """Axes with the same letter live and die together; a letter that is not in the result is contracted."""
    inputs, output, values = _letters(call)
    by_letter, bare = _ties(inputs, values, labeler)
    for letter in bare & set(by_letter):
        labeler.freeze(by_letter[letter], f"meets a tensor without channels in {call.op}")
    for letter in set(by_letter) - set(output):
        labeler.consume(by_letter[letter], call.layer)
    for letters, value in zip(inputs, values, strict=True):
        own = [axis for axis, letter in enumerate(letters) if letter in output and sum(letter in x for x in inputs) == 1]
        for axis in [axis for axis in own if value.name and axis in value.axes]:
            labeler.produce(value.axes[axis], call.layer, value.name, axis)
    sizes = {letter: size for letters, v in zip(inputs, values, strict=True) for letter, size in zip(letters, v.shape, strict=True)}
    constant = math.prod(size for letter, size in sizes.items() if letter not in by_letter)
    if set("".join(inputs)) - set(output):  # without a contraction it only scales
        labeler.spend(call.layer, max(constant // call.batch, 1), *[(labels, 1) for labels in by_letter.values()])
    return Value(call.outputs[0], {axis: by_letter[letter] for axis, letter in enumerate(output) if letter in by_letter})


def _ties(inputs: list[str], values: list[Value], labeler: Labeler) -> tuple[dict[str, IntArray], set[str]]:
    """Labels per letter, tied where it occurs twice; letters that some tensor has without labels."""
    by_letter: dict[str, IntArray] = {}
    bare: set[str] = set()
    for letters, value in zip(inputs, values, strict=True):
        for axis, letter in enumerate(letters):
            labels = value.axes.get(axis)
            if labels is None:
                if value.shape[axis] > 1:
                    bare.add(letter)
            elif letter in by_letter and len(labels) == len(by_letter[letter]):
                labeler.tie(by_letter[letter], labels)
            elif len(labels) > len(by_letter.get(letter, ())):
                by_letter[letter] = labels
    return by_letter, bare


@spares(aten.einsum)
def kept_letters(call: Call, value: Value) -> Collection[int]:
    """Axes whose letter every tensor has, the result included; else those of the result."""
    inputs, output, values = _letters(call)
    own = next(letters for letters, v in zip(inputs, values, strict=True) if v is value)
    everywhere = [axis for axis, letter in enumerate(own) if letter in output and all(letter in letters for letters in inputs)]
    return [axis for axis in everywhere if axis > 0] or [axis for axis, letter in enumerate(own) if letter in output]


def _letters(call: Call) -> tuple[list[str], str, list[Value]]:
    """Letters per input, letters of the result, the inputs; dots become capital letters that stand for batch axes."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    left, _, right = equation.partition("->")
    values, parts = call.values, left.split(",")
    spans = [len(v.shape) - len(p.replace("...", "")) for v, p in zip(values, parts, strict=True) if "..." in p]
    longest = max(spans, default=0)
    dots = "".join(chr(0x391 + k) for k in range(longest))
    inputs = []
    for value, part in zip(values, parts, strict=True):
        own = len(value.shape) - len(part.replace("...", ""))
        inputs.append(part.replace("...", dots[longest - own :]))
    if not right and "->" not in equation:
        together = "".join(parts).replace(".", "")
        right = "..." * ("..." in equation) + "".join(sorted(c for c in set(together) if together.count(c) == 1))
    return inputs, right.replace("...", dots), values


def _matched(left: Value, i: int, right: Value, j: int, call: Call, labeler: Labeler) -> IntArray | None:
    """Tie two axes that are contracted with one another; the labels, if both carry some."""
    a, b = left.axes.get(len(left.shape) + i), right.axes.get(len(right.shape) + j)
    if a is not None and b is not None:
        labeler.tie(a, b)
        labeler.consume(a, call.layer)
        return a
    for labels in (a, b):
        if labels is not None:
            labeler.freeze(labels, f"is contracted with an axis without channels in {call.op}")
    return None


def _without(value: Value, *axes: int) -> Value:
    """The value with some axes counted as of length 1."""
    dropped = {len(value.shape) + axis for axis in axes}
    shape = tuple(1 if axis in dropped else size for axis, size in enumerate(value.shape))
    return Value(shape, {axis: labels for axis, labels in value.axes.items() if axis not in dropped}, value.why)
