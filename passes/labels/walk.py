"""Walk a traced graph once and let every op's rule write down what it does to channels."""

import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.errors import PassError
from compressor.passes.labels.labeler import Labeler, Value
from compressor.passes.labels.rules import CARRIES, RULES, SPARES, Call, SpareFunction, key_of
from compressor.passes.labels.rules.filling import FILLS
from compressor.passes.labels.splits import settle
from compressor.passes.tracing.call_arguments import arguments_of
from compressor.passes.tracing.shapes import scalar_of, shapes_of
from compressor.passes.tracing.trace import BATCH, is_traced

logger = logging.getLogger(__name__)

_HYPER = ("groups", "num_groups", "normalized_shape")
_SIZES = frozenset({torch.ops.aten.sym_size})  # sizes of channel axes are constants; these ask for the batch


@dataclass(frozen=True)
class Walk:
    """What a walk found.

    Attributes:
        labeler: The facts.
        values: Node name -> labels per output tensor.
        calls: Node name -> the call that its rule saw.
        unknown: Ops without a rule, as `op at node`.
    """

    labeler: Labeler
    values: Mapping[str, tuple[Value, ...]]
    calls: Mapping[str, Call]
    unknown: tuple[str, ...]


def _never(call: Call) -> bool:
    del call
    return False


def walk(gm: fx.GraphModule) -> Walk:
    """Label every channel of `gm`.

    Raises:
        PassError: `gm` did not come from `trace`.
    """
    if not is_traced(gm):
        raise PassError("this graph does not come from compressor.trace; trace the model first")
    walker = _Walker(gm)
    for node in gm.graph.nodes:
        walker.visit(node)
    walker.settle_all()
    return Walk(walker.labeler, walker.values, walker.calls, tuple(walker.unknown))


class _Walker:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.labeler = Labeler()
        self.values: dict[str, tuple[Value, ...]] = {}
        self.calls: dict[str, Call] = {}
        self.unknown: list[str] = []
        self._visitors: dict[str, Callable[[fx.Node], None]] = {
            "placeholder": self._placeholder,
            "get_attr": self._get_attr,
            "call_function": self._call,
            "call_module": self._call,
            "output": self._output,
        }

    def visit(self, node: fx.Node) -> None:
        if node.op not in self._visitors:
            raise PassError(f"node `{node.name}` is a {node.op}; a traced graph has none of these")
        self._visitors[node.op](node)

    def _placeholder(self, node: fx.Node) -> None:
        self.values[node.name] = tuple(Value(shape, why=f"model input `{node.name}`") for shape in shapes_of(node))

    def _get_attr(self, node: fx.Node) -> None:
        tensor = self._stored(str(node.target))
        self.values[node.name] = (self.labeler.parameter(str(node.target), tensor),) if isinstance(tensor, Tensor) else ()

    def _stored(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return cast(Tensor, getattr(self.gm.get_submodule(path), leaf))

    def _output(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self.values[source.name] = tuple(settle(value, self.labeler) for value in self.values[source.name])
            for value in self.values[source.name]:
                self.labeler.freeze_value(value, f"model output `{source.name}`")

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            values = self.values[cast(fx.Node, node.args[0]).name]
            self.values[node.name] = (values[cast(int, node.args[1])],) if values else ()
            return
        shapes = shapes_of(node)
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        call = Call(
            node, self._layer(node), self._arguments(node, module), shapes, module, cast(int, self.gm.meta[BATCH]), self._stored
        )
        self.calls[node.name] = call
        if key_of(node, module) in _SIZES:
            self.values[node.name] = ()
            return
        if not call.values and key_of(node, module) not in FILLS:
            reason = f"`{node.name}`, which no channel flows into"
            self.values[node.name] = tuple(Value(shape, why=reason) for shape in shapes)
            return
        key = key_of(node, module)
        if any(value.grids for value in call.values) and not CARRIES.get(key, _never)(call):
            self._settle_inputs(node, call, SPARES.get(key))
            call = replace(call, arguments=self._arguments(node, module))
            self.calls[node.name] = call
        function = RULES.get(key)
        if function is None:
            self._refuse(call)
            return
        first = self.labeler.count
        self.labeler.node = node.name
        try:
            result = function(call, self.labeler)
        except Exception as error:  # an op in a form that its rule was not made for: frozen like an unknown one, and said
            logger.warning("analyze: the rule of %s does not take it (%s); what it touches is frozen", call.op, error)
            self.labeler.freeze(np.arange(first, self.labeler.count), f"is touched by {call.op}, whose rule does not take it")
            self._refuse(call)
            return
        values = tuple(result) if isinstance(result, list) else (result,)
        if any(len(labels) != value.shape[axis] for value in values for axis, labels in value.axes.items()):
            self._refuse(call)  # the rule does not hold for inputs of this rank
            return
        self.values[node.name] = values

    def _settle_inputs(self, node: fx.Node, call: Call, spare: SpareFunction | None) -> None:
        """Choose, for channels that reach this op spread over several axes, one that they may go along."""
        for source in node.all_input_nodes:
            if any(value.grids for value in self.values[source.name]):
                self.values[source.name] = tuple(
                    settle(value, self.labeler, spare(call, value) if spare is not None and value.grids else None)
                    for value in self.values[source.name]
                )
                call = replace(call, arguments=self._arguments(node, call.module))  # the next one sees what was chosen

    def settle_all(self) -> None:
        """Choose wherever nothing has asked, and let every recorded call see what was chosen."""
        for name, values in self.values.items():
            self.values[name] = tuple(settle(value, self.labeler) for value in values)
        for name, call in self.calls.items():
            if any(value.grids for value in call.values):
                self.calls[name] = replace(call, arguments=self._arguments(call.node, call.module))

    def _refuse(self, call: Call) -> None:
        self.unknown.append(call.op)
        self._settle_inputs(call.node, call, None)
        call = replace(call, arguments=self._arguments(call.node, call.module))
        self.calls[call.node.name] = call
        for value in call.values:
            self.labeler.freeze_value(value, f"is touched by {call.op}, which has no rule")
        why = f"the output of {call.op}, which has no rule"
        self.values[call.node.name] = tuple(Value(shape, why=why) for shape in call.outputs)

    def _layer(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        stack = cast(dict[str, tuple[str, object]], node.meta.get("nn_module_stack") or {})
        return (list(stack.values())[-1][0].split("@")[0] if stack else "") or node.name

    def _arguments(self, node: fx.Node, module: nn.Module | None) -> dict[str, object]:
        if module is None:
            return {name: self._argument(value) for name, value in arguments_of(node).items()}
        arguments: dict[str, object] = {"input": self._argument(node.args[0])}
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        axes = (0, 1) if isinstance(module, nn.modules.conv._ConvNd) else None
        for name, tensor in tensors.items():
            chosen = axes if name == "weight" else None
            if name != "num_batches_tracked":
                arguments[name] = self.labeler.parameter(f"{node.target}.{name}", tensor, chosen)
        arguments.update({name: getattr(module, name) for name in _HYPER if hasattr(module, name)})
        return arguments

    def _argument(self, argument: object) -> object:
        if isinstance(argument, fx.Node):
            scalar = scalar_of(argument)
            if scalar is not None:
                return scalar
            values = self.values[argument.name]
            return values[0] if len(values) == 1 else list(values)
        if isinstance(argument, list | tuple):
            return [self._argument(item) for item in argument]
        return argument
