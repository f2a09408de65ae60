"""Graphs as plain objects that can be pickled, for other processes of the same installation.

`fx.GraphModule` pickles the code that it generated and traces it anew, which loses recorded shapes and cannot bring back
every op of a traced graph. What is sent here are the nodes themselves and the modules.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from compressor.errors import PassError

_META = ("compressor.value", "nn_module_stack")  # what passes read of a node


@dataclass(frozen=True)
class _Reference:
    """Stands for a node among the arguments of another."""

    name: str


@dataclass(frozen=True)
class Portable:
    """A graph module in parts.

    Attributes:
        nodes: `(op, name, target, args, kwargs, meta)` of each; ops of PyTorch by their names.
        modules: Everything that holds tensors.
        meta: Of the graph module.
        training: Its mode.
        codegen: How its inputs and outputs are nested.
    """

    nodes: tuple[tuple[str, str, Any, Any, Any, dict[str, Any]], ...]
    modules: nn.Module
    meta: dict[str, Any]
    training: bool
    codegen: Any


def portable(gm: fx.GraphModule) -> Portable:
    """A traced graph in parts that can be pickled, as far as its modules can."""
    root = nn.Module()
    root._modules, root._parameters, root._buffers = dict(gm._modules), dict(gm._parameters), dict(gm._buffers)
    root._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    nodes = []
    for node in gm.graph.nodes:
        args, kwargs = (fx.node.map_arg(value, _reference) for value in (node.args, node.kwargs))
        meta = {key: node.meta[key] for key in _META if key in node.meta}
        if "nn_module_stack" in meta:  # classes of the user's need not be known elsewhere
            meta["nn_module_stack"] = {key: tuple(map(str, value)) for key, value in meta["nn_module_stack"].items()}
        nodes.append((node.op, node.name, _named(node.target), args, kwargs, meta))
    return Portable(tuple(nodes), root, dict(gm.meta), gm.training, gm.graph._codegen)


def assembled(parts: Portable) -> fx.GraphModule:
    """The graph module of the parts; it shares their tensors."""
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, meta in parts.nodes:
        own_args, own_kwargs = (_resolved(value, known) for value in (args, kwargs))
        node = graph.create_node(op, _target(target), own_args, own_kwargs, name=name)
        if node.name != name:
            raise PassError(f"node `{name}` was renamed to `{node.name}` on its way")
        node.meta.update(meta)
        known[name] = node
    graph._codegen = copy.copy(parts.codegen)
    gm = fx.GraphModule(parts.modules, graph)
    gm.meta = dict(parts.meta)
    return gm.train(parts.training)


def _reference(node: fx.Node) -> Any:
    return _Reference(node.name)


def _named(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Op(target.namespace, target._opname, target._overloadname)
    return target


@dataclass(frozen=True)
class _Op:
    """An op of PyTorch."""

    namespace: str
    name: str
    overload: str


def _target(target: Any) -> Any:
    if isinstance(target, _Op):
        return getattr(getattr(getattr(torch.ops, target.namespace), target.name), target.overload)
    return target


def _resolved(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, _Reference):
        return known[value.name]
    if isinstance(value, tuple | list):
        return type(value)(_resolved(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _resolved(item, known) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_resolved(item, known) for item in (value.start, value.stop, value.step)))
    return value
