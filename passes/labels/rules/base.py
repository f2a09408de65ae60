"""The table of op rules, and what a rule is given.

A rule says what one op does to channel labels, and, if removing channels makes its constants wrong,
how to edit them:

    @rule(aten.my_op)
    def my_op(call, labeler):            # -> Value, or a list of them for an op with several outputs
        return elementwise(call, labeler)

    @edit(aten.my_op)
    def my_op_sizes(change):             # rewrite change.node.args where a size no longer holds
        ...

Keys are ATen overload packets (`torch.ops.aten.add`) and module classes (`nn.Conv2d`). An op without a
rule freezes every label that reaches it. Registering a key twice is an error.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.passes.labels.labeler import Labeler, Value

BoolArray: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Call:
    """One op in the graph, its inputs as labels.

    Attributes:
        node: The node.
        layer: Qualified name of the module that it stands for or comes from.
        arguments: By the names of the ATen schema (`input`, `weight`, `groups`, …) for functions and for
            modules alike; tensors as `Value`, symbolic sizes as their traced values.
        outputs: Shape per output tensor.
        module: The module of a `call_module` node.
        batch: The traced batch size.
        stored: A parameter or buffer by its qualified name.
    """

    node: fx.Node
    layer: str
    arguments: Mapping[str, object]
    outputs: tuple[tuple[int, ...], ...]
    module: nn.Module | None
    batch: int
    stored: Callable[[str], Tensor]

    @property
    def op(self) -> str:
        """For messages: `aten.relu.default at `relu_1``."""
        return f"{type(self.module).__name__ if self.module is not None else self.node.target} at `{self.node.name}`"

    @property
    def values(self) -> list[Value]:
        """Every tensor among the arguments, lists of tensors included, in order."""
        found: list[Value] = []
        for argument in self.arguments.values():
            if isinstance(argument, Value):
                found.append(argument)
            elif isinstance(argument, list | tuple):
                found += [item for item in argument if isinstance(item, Value)]
        return found

    def tensor(self, name: str) -> Value:
        """A tensor argument that must be there."""
        return cast(Value, self.arguments[name])

    def optional(self, name: str) -> Value | None:
        """A tensor argument that may be None."""
        value = self.arguments.get(name)
        return value if isinstance(value, Value) else None

    def integer(self, name: str) -> int:
        """An integer argument."""
        return int(cast(int, self.arguments[name]))

    def integers(self, name: str) -> list[int]:
        """An argument that is a list of integers (a lone integer counts as a list of one)."""
        value = self.arguments[name]
        return [int(v) for v in value] if isinstance(value, Sequence) else [int(cast(int, value))]


@dataclass(frozen=True)
class Change:
    """What a removal does around one node whose constants may need editing.

    Attributes:
        node: The node in the new graph.
        call: The call as it was analysed.
        inputs: Labels of the first tensor input.
        outputs: Labels per output.
        kept_of: Which of some labels stay.
        constant: Stores an index list as a buffer of the new graph, in place of the one with the given name
            where nothing else reads that; returns a node that reads it.
    """

    node: fx.Node
    call: Call
    inputs: Value
    outputs: tuple[Value, ...]
    kept_of: Callable[[NDArray[np.int64]], BoolArray]
    constant: Callable[[NDArray[np.int64], str], fx.Node]

    def kept(self, value: Value, axis: int) -> BoolArray:
        """Mask over an axis: what stays. All of it where the axis carries no labels."""
        labels = value.axes.get(axis)
        return np.ones(value.shape[axis], dtype=bool) if labels is None else self.kept_of(labels)

    def size(self, value: Value, axis: int) -> int:
        """New size of an axis."""
        return int(self.kept(value, axis).sum())

    def unchanged(self, value: Value, axis: int) -> bool:
        """Whether an axis keeps its size."""
        return bool(self.kept(value, axis).all())

    def changed(self, value: Value) -> list[int]:
        """Axes whose size changes."""
        return [axis for axis in value.axes if not self.kept(value, axis).all()]

    def set(self, position: int, name: str, argument: object) -> None:
        """Replace one argument, wherever it stands."""
        if name in self.node.kwargs:
            self.node.update_kwarg(name, cast(fx.node.Argument, argument))
        elif position < len(self.node.args):
            self.node.update_arg(position, cast(fx.node.Argument, argument))
        else:
            self.node.kwargs = {**self.node.kwargs, name: cast(fx.node.Argument, argument)}


RuleFunction: TypeAlias = Callable[[Call, Labeler], Value | list[Value]]
EditFunction: TypeAlias = Callable[[Change], None]

SpareFunction: TypeAlias = Callable[[Call, Value], Collection[int]]
CarryFunction: TypeAlias = Callable[[Call], bool]

_F = TypeVar("_F")

RULES: dict[object, RuleFunction] = {}
EDITS: dict[object, EditFunction] = {}
SPARES: dict[object, SpareFunction] = {}
CARRIES: dict[object, CarryFunction] = {}


def rule(*keys: object) -> Callable[[RuleFunction], RuleFunction]:
    """Register what the ops `keys` do to labels.

    Raises:
        ValueError: One of them has a rule already.
    """
    return _registrar(RULES, "rule", keys)


def edit(*keys: object) -> Callable[[EditFunction], EditFunction]:
    """Register how the constants of the ops `keys` follow a removal.

    Raises:
        ValueError: One of them has an edit already.
    """
    return _registrar(EDITS, "edit", keys)


def spares(*keys: object) -> Callable[[SpareFunction], SpareFunction]:
    """Register which axes of an input the ops `keys` leave as they are.

    Where channels come spread over several axes (`Split`), they go along one of these rather than along an
    axis that is contracted, normalised or cut.

    Raises:
        ValueError: One of them is registered already.
    """
    return _registrar(SPARES, "spare axes", keys)


def carries(*keys: object) -> Callable[[CarryFunction], CarryFunction]:
    """Register when the rules of the ops `keys` take values whose channels are spread over several axes.

    Raises:
        ValueError: One of them is registered already.
    """
    return _registrar(CARRIES, "condition", keys)


def _registrar(table: dict[object, _F], what: str, keys: tuple[object, ...]) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        for key in keys:
            if key in table:
                raise ValueError(f"{key} already has the {what} {table[key]}")
            table[key] = function
        return function

    return register


def key_of(node: fx.Node, module: nn.Module | None) -> object:
    """What `RULES` and `EDITS` are asked for."""
    if node.op == "call_module":
        return type(module)
    return getattr(node.target, "overloadpacket", node.target)
