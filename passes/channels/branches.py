"""Branches: what stands beside a shortcut and can go as a whole, so that the op behind it *is* the shortcut.

    x ──► conv ──► norm ──► (+) ──►             x ──►
    └────────── shortcut ────┘

    x ──► mean ─► fc ─► σ ─► (*) ──►        x ──►
    └────────── shortcut ────┘

Found in the graph, not by classes of blocks: an operand of an addition is a branch where everything that is computed for it is
computed for it alone, from values that others read as well. Batch norms, layer scale, drop path and gates on the way are a part
of it, and so may be other branches. So is a *gate*, an operand of a multiplication that is one number for a whole channel or pixel
(squeeze and excitation): without it the channels are what they were, and the layers that read them learn its mean.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from compressor.passes.layers.product import is_product
from compressor.passes.tracing.call_arguments import writers_of, written_by
from compressor.passes.tracing.shapes import shapes_of

aten = torch.ops.aten

ADDITIONS: dict[object, tuple[int, ...]] = {aten.add: (0, 1), aten.add_: (0, 1), aten.sub: (1,), aten.sub_: (1,)}
"""Op -> which of its operands may be a branch."""

GATES: dict[object, tuple[int, ...]] = {aten.mul: (0, 1), aten.mul_: (1,)}
"""Op -> which of its operands may be a gate."""


@dataclass(frozen=True)
class Branch:
    """A branch that can be removed.

    Attributes:
        name: That of the module that it is, where there is one; else of its first and its last layer.
        at: Node of the addition.
        operand: Node of what is added: the branch's output.
        shortcut: Node of what remains of the addition without it.
        nodes: Of the branch alone, in the order of the graph.
        layers: The modules that they call.
        inside: Names of the branches within it.
        gate: Whether it is multiplied by, and not added.
    """

    name: str
    at: str
    operand: str
    shortcut: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    inside: tuple[str, ...] = ()
    gate: bool = False


def branches_of(graph: fx.GraphModule) -> tuple[Branch, ...]:
    """Every branch of a traced graph, in the order of their additions."""
    order = {node: k for k, node in enumerate(graph.graph.nodes)}
    images = _depend_on_inputs(graph.graph)
    found: list[tuple[fx.Node, fx.Node, fx.Node, list[fx.Node]]] = []
    for node in graph.graph.nodes:
        for operand, shortcut in _operands(node):
            alone = _alone(operand, node)
            if alone is None or shortcut not in images or _is_stream(graph, operand, alone) or _written(node, shortcut, order):
                continue
            if any(is_product(graph, own) for own in alone):
                found.append((node, operand, shortcut, sorted(alone, key=order.__getitem__)))
    names = _names(graph, [own for *_, own in found])
    members = [frozenset(own) for *_, own in found]
    branches = []
    for k, (node, operand, shortcut, own) in enumerate(found):
        inside = tuple(names[n] for n, other in enumerate(members) if n != k and found[n][0] in members[k] and other < members[k])
        layers = tuple(dict.fromkeys(str(n.target) for n in own if n.op == "call_module"))
        branches.append(
            Branch(names[k], node.name, operand.name, shortcut.name, tuple(n.name for n in own), layers, inside, _is_gate(node))
        )
    return tuple(branches)


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs (what may go, what then remains) of an addition whose result has the shape of both, or of a gate's multiplication."""
    places = (GATES if _is_gate(node) else ADDITIONS).get(getattr(node.target, "overloadpacket", None), ())
    if node.op != "call_function" or len(node.args) < 2:
        return
    for place in places:
        operand, shortcut = node.args[place], node.args[1 - place]
        if not isinstance(operand, fx.Node) or not isinstance(shortcut, fx.Node) or operand is shortcut:
            continue
        if _is_gate(node):
            if _spreads(shapes_of(operand), shapes_of(shortcut)) and shapes_of(shortcut) == shapes_of(node):
                yield operand, shortcut
            continue
        scaled = place == 0 and node.kwargs.get("alpha", 1) != 1  # the shortcut would have to be scaled
        if not scaled and shapes_of(operand) == shapes_of(shortcut) == shapes_of(node) != ():
            yield operand, shortcut


def _is_gate(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in GATES


def _spreads(small: tuple[tuple[int, ...], ...], large: tuple[tuple[int, ...], ...]) -> bool:
    """Whether one tensor has one number where the other has many, along some axes, and is of its shape along the others."""
    if len(small) != 1 or len(large) != 1 or len(small[0]) != len(large[0]) or small == large:
        return False
    return all(a in (1, b) for a, b in zip(small[0], large[0], strict=True)) and small[0][0] == large[0][0]


def _alone(operand: fx.Node, reader: fx.Node) -> set[fx.Node] | None:
    """The nodes that are computed for one operand of `reader` alone; None where it cannot go without taking more along."""
    if set(operand.users) != {reader}:
        return None
    alone, waiting = {operand}, [operand]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return None
        for source in node.all_input_nodes:
            if source not in alone and all(user in alone for user in source.users):
                alone.add(source)
                waiting.append(source)
    if any(set(written_by(node)) - alone for node in alone):  # what others read would change
        return None
    return alone


def _is_stream(graph: fx.GraphModule, operand: fx.Node, alone: set[fx.Node]) -> bool:
    """Whether a value from outside goes through by additions and activations alone: then the operand is a shortcut itself."""
    waiting = [operand]
    while waiting:
        node = waiting.pop()
        adds = getattr(node.target, "overloadpacket", None) in ADDITIONS
        sources = node.all_input_nodes
        same = len(sources) == 1 and shapes_of(sources[0]) == shapes_of(node)
        if is_product(graph, node) or not (adds or same):
            continue
        if any(source not in alone for source in sources):
            return True
        waiting += sources
    return False


def _written(addition: fx.Node, shortcut: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether something behind an addition writes to it by a view, or to the shortcut: one would then change with the other."""
    pairs = writers_of({addition, shortcut})
    return any(alias is not addition and order[user] > order[addition] for alias, user in pairs)


def _depend_on_inputs(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _names(graph: fx.GraphModule, branches: Sequence[Sequence[fx.Node]]) -> list[str]:
    """A name for each, none of them twice."""
    layers = [_module(node) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")]
    below: dict[str, set[str]] = collections.defaultdict(set)  # module -> the layers in it
    for layer in layers:
        for end in range(layer.count(".") + 1):
            below[layer.rsplit(".", end)[0]].add(layer)
    names: list[str] = []
    for nodes in branches:
        own = [_module(node) for node in nodes if node.op in ("call_module", "get_attr")]
        whole = [path for path, inner in below.items() if inner == set(own)]
        name = max(whole, key=len) if whole else _span(own[0], own[-1])
        names.append(name if name not in names else f"{name} at {nodes[-1].name}")
    return names


def _module(node: fx.Node) -> str:
    """The module that a node calls, or whose tensor it reads."""
    name = str(node.target)
    return name if node.op == "call_module" else name.rpartition(".")[0] or name


def _span(first: str, last: str) -> str:
    """`block.conv1` and `block.conv2` as `block.conv1-conv2`."""
    one, other = first.split("."), last.split(".")
    common = 0
    while common < min(len(one), len(other)) - 1 and one[common] == other[common]:
        common += 1
    return first if first == last else f"{first}-{'.'.join(other[common:])}"
