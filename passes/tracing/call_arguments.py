"""Arguments of an ATen call by the names of its schema."""

from typing import Any

from torch import fx


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call, defaults included; of a function without a schema, by position."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(k): value for k, value in enumerate(node.args)}, **node.kwargs}
    result: dict[str, Any] = {}
    for k, argument in enumerate(schema.arguments):
        if k < len(node.args):
            result[argument.name] = node.args[k]
        else:
            result[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return result
