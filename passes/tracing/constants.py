"""Constants that `forward` computes from nothing: evaluated once, kept as buffers.

`torch.arange(12)`, `torch.linspace(...)`, `torch.tensor([...])` and what is made of them alone (a mask, a window's
relative positions) yield the same tensor in every run. As a buffer such a tensor carries labels like any
other and is narrowed with the channels that it meets; it also moves to the graph's device with it.
"""

from collections.abc import Collection

import torch
from torch import Tensor, fx

_LARGEST = 1 << 22  # elements; beyond that computing it anew costs less than carrying it


def fold_literals(graph: fx.Graph, root: dict[str, object], stored: Collection[str], largest: int = _LARGEST) -> list[str]:
    """Evaluate constant nodes of `graph`; returns the names of the buffers that were added to `root`.

    Args:
        graph: Changed in place.
        root: What `get_attr` nodes refer to, by qualified name.
        stored: Names of the model's own parameters and buffers: these may change, and are no constants.
        largest: Tensors of more elements are computed anew each time.
    """
    values: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        value = _evaluate(node, values, root, stored)
        value = None if value is not None and value.numel() > largest and node.op != "get_attr" else value
        if value is not None:
            values[node] = value
    added: list[str] = []
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if not outside or node.op == "get_attr":
            continue
        name = f"literal_{len(added)}"
        while name in root:
            name += "_"
        with graph.inserting_before(node):
            buffer = graph.create_node("get_attr", name)
        buffer.meta = dict(node.meta)
        for user in outside:
            user.replace_input_with(node, buffer)
        root[name] = value
        added.append(name)
    for node in reversed(list(values)):
        if not node.users:
            if node.op == "get_attr":
                root.pop(str(node.target), None)
            graph.erase_node(node)
    return added


def _evaluate(node: fx.Node, values: dict[fx.Node, Tensor], root: dict[str, object], stored: Collection[str]) -> Tensor | None:
    """The tensor that a node always yields, or None."""
    if node.op == "get_attr":
        value = root.get(str(node.target))
        constant = isinstance(value, Tensor) and str(node.target) not in stored and not _mutated(node)
        return value.detach() if constant and isinstance(value, Tensor) else None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema, tags = node.target._schema, node.target.tags
    if schema.is_mutable or torch.Tag.nondeterministic_seeded in tags or _mutated(node):
        return None
    if any(source not in values for source in node.all_input_nodes) or len(schema.returns) != 1:
        return None
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    return result.clone() if isinstance(result, Tensor) else None


def _mutated(node: fx.Node) -> bool:
    """Whether an op changes the tensor of a node, or a view of it, in place."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        if schema.is_mutable and user.args and user.args[0] is node:
            return True
        if any(one.alias_info is not None for one in schema.returns) and _mutated(user):
            return True
    return False
