"""Arguments of an ATen call: by the names of its schema, and which of them it writes to."""

from collections.abc import Collection, Iterator
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


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    pairs = zip(node.args, schema.arguments, strict=False)
    return [a for a, about in pairs if isinstance(a, fx.Node) and about.alias_info is not None and about.alias_info.is_write]


def writers_of(values: Collection[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs `(alias, op that writes to it)` for some values and every view of them; what such an op returns is not followed."""
    aliases, waiting = set(values), list(values)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            schema = getattr(user.target, "_schema", None)
            if node in written_by(user):
                yield node, user
            elif schema is not None and any(r.alias_info is not None for r in schema.returns) and user not in aliases:
                aliases.add(user)
                waiting.append(user)
