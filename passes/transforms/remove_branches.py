"""Branches out of a graph: an addition (a gate's multiplication) becomes its shortcut, and what was computed for it alone is gone.

    x = relu(a);  y = relu(x + branch(x))        becomes        x = relu(a)

An activation that would be applied to its own result goes along, as the second one here: a back end would run it. *Where the
original's values come to lie* (`rewiring`) is what a repair has to aim at: the x that is left stands for y.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from compressor.errors import PlanError
from compressor.passes.channels.branches import Branch
from compressor.passes.tracing.call_arguments import written_by

aten = torch.ops.aten

_TWICE_AS_ONCE: dict[object, str] = {aten.relu: "relu", aten.relu_: "relu", aten.relu6: "relu6", aten.relu6_: "relu6"}


def branches_named(branches: Iterable[Branch], names: Collection[str]) -> list[Branch]:
    """The branches of these names, in the order of their additions; those within another of them are left out.

    Raises:
        PlanError: There is none of a name, or nothing would be left of an addition.
    """
    by_name = {branch.name: branch for branch in branches}
    unknown = sorted(set(names) - set(by_name))
    if unknown:
        raise PlanError(f"the plan removes branch `{unknown[0]}`, which is not there (compressor inspect lists them)")
    inside = {name for own in names for name in by_name[own].inside}
    found = [branch for name, branch in by_name.items() if name in names and name not in inside]
    whole: dict[str, str] = {}
    for branch in found:
        if branch.at in whole:
            raise PlanError(f"the plan removes both `{whole[branch.at]}` and `{branch.name}` of one addition; one has to stay")
        whole[branch.at] = branch.name
    return found


def remove_branches(gm: fx.GraphModule, branches: Iterable[Branch]) -> None:
    """Take branches out of a graph whose nodes have the names of the one that was analysed; `gm` is changed in place.

    Args:
        gm: The graph.
        branches: As `branches_named`.
    """
    before = _used(gm)
    for branch in branches:
        nodes = {node.name: node for node in gm.graph.nodes}
        addition = nodes[branch.at]
        shortcut = next(a for a in addition.args if isinstance(a, fx.Node) and a.name != branch.operand)
        for user in list(addition.users):
            if _same_activation(user, shortcut):
                user.replace_all_uses_with(shortcut)
                gm.graph.erase_node(user)
            else:
                _out_of_place(user, addition)
        addition.replace_all_uses_with(shortcut)
        gm.graph.erase_node(addition)
        _erase(gm.graph, [nodes[name] for name in reversed(branch.nodes) if name in nodes])
    used = _used(gm)
    for target in sorted(before - used):
        if not any(_within(target, other) or _within(other, target) for other in used):
            _delete(gm, target)
    gm.graph.lint()
    gm.recompile()


@dataclass(frozen=True)
class Rewiring:
    """What has come to stand for what.

    Attributes:
        instead: Node that went -> the node that is read in its place.
        means: Node that is left -> the node of the original whose value it is to have from now on. Where something else that is
            left wants its own value, it is not named.
    """

    instead: Mapping[str, str]
    means: Mapping[str, str]


def rewiring(graph: fx.Graph, branches: Iterable[Branch]) -> Rewiring:
    """What the removal of branches does to those who read their sums.

    Args:
        graph: The original.
        branches: What was removed, as `branches_named`.
    """
    branches = list(branches)
    nodes = {node.name: node for node in graph.nodes}
    gone = {name for branch in branches for name in branch.nodes}
    instead: dict[str, str] = {}
    means: dict[str, str] = {}
    wanted: set[str] = set()  # nodes that are left, and that something else reads as what they were
    for branch in branches:
        addition, before = nodes[branch.at], nodes[branch.shortcut]
        left = nodes[instead.get(before.name, before.name)]
        activations = [user for user in addition.users if _same_activation(user, left)]
        instead[addition.name] = left.name
        instead.update({user.name: left.name for user in activations})
        others = [user for user in before.users if user is not addition and user.name not in gone]
        if others or (activations and len(addition.users) > 1):
            wanted.add(left.name)
        if left.name in wanted or branch.gate:  # what a gate has scaled is made up for by those who read it
            continue
        means[left.name] = activations[0].name if activations else addition.name
        source = left.args[0] if activations else None
        if isinstance(source, fx.Node) and len(source.users) == 1:  # the activation that is left makes the last one's values of it
            means[source.name] = addition.name
    return Rewiring(instead, means)


def _same_activation(node: fx.Node, other: fx.Node) -> bool:
    kinds = [_TWICE_AS_ONCE.get(getattr(own.target, "overloadpacket", None)) for own in (node, other)]
    return kinds[0] is not None and kinds[0] == kinds[1]


def _out_of_place(user: fx.Node, argument: fx.Node) -> None:
    """An op that would write to the shortcut, which others may read, gives a tensor of its own."""
    if argument not in written_by(user):
        return
    schema = user.target._schema  # type: ignore[union-attr]
    packet = getattr(aten, str(schema.name).removeprefix("aten::").removesuffix("_"), None)
    overload = getattr(packet, schema.overload_name or "default", None)
    if overload is None:
        raise PlanError(f"`{user.name}` writes to the value behind a branch that is to be removed, and cannot do without")
    user.target = overload


def _used(gm: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in gm.graph.nodes if node.op in ("call_module", "get_attr")}


def _erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Nodes, the last first, and the constants that the removal of channels has put in front of them."""
    constants = {source for node in nodes for source in node.all_input_nodes if source.op == "get_attr"} - set(nodes)
    for node in nodes:
        graph.erase_node(node)
    for node in sorted(constants):
        if not node.users:
            graph.erase_node(node)


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _delete(gm: fx.GraphModule, target: str) -> None:
    """Remove a module, parameter or buffer, and the modules that hold nothing without it; one that went with its owner is gone."""
    while target:
        owner, _, leaf = target.rpartition(".")
        try:
            parent = gm.get_submodule(owner)
        except AttributeError:
            return
        if not hasattr(parent, leaf):
            return
        delattr(parent, leaf)
        if not owner or any(True for _ in parent.children()) or parent._parameters or parent._buffers:
            return
        target = owner
