"""Who reads channels: the layers of a graph that compensation can repair, and what stands behind each.

    reader ──► [batch norm] ──► [+ shortcut]

The norm tells how much an error of each output counts; the shortcut brings errors of its own, which the layer can make
up for.
"""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.errors import PlanError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.labels.labeler import IntArray
from compressor.passes.layers.norms import foldable, scale_and_shift
from compressor.passes.layers.product import Product, is_product
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.tracing.trace import device_of
from compressor.values.plan import Plan

_Norm = nn.modules.batchnorm._BatchNorm
_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True, eq=False)
class Reader:
    """A convolution or linear layer that is called once.

    Attributes:
        node: Name of its node.
        layer: Its qualified name.
        inputs: Label of each input channel, or None where none of them can go.
        outputs: Label of each output channel, or None.
        norm: Node of the batch norm that alone reads its output, where there is one.
        shortcut: Node of what is added to that, where there is one.
        end: Node of the sum, else of the norm, else of the layer.
    """

    node: str
    layer: str
    inputs: IntArray | None
    outputs: IntArray | None
    norm: str | None
    shortcut: str | None
    end: str


def readers_of(channels: ChannelGraph) -> dict[str, Reader]:
    """Node name -> reader, in the order of the graph."""
    graph = channels.graph
    uses, shared, norms = _uses(graph), _shared(graph), dict(foldable(graph))
    found = {}
    for node in graph.graph.nodes:
        if not is_product(graph, node) or uses[str(node.target)] > 1 or str(node.target) in shared:
            continue
        axis = Product(graph.get_submodule(str(node.target))).channel_axis
        norm = norms.get(node)
        shortcut = _shortcut(node, norm)
        call = channels.walk.calls[node.name]
        values = (call.tensor("input"), channels.walk.values[node.name][0])
        inputs, outputs = (value.axes.get(axis % len(value.shape)) for value in values)
        last = norm or node
        end = next(iter(last.users)) if shortcut is not None else last
        names = (norm.name if norm else None, shortcut.name if shortcut else None, end.name)
        found[node.name] = Reader(node.name, str(node.target), inputs, outputs, *names)
    return found


def biases_added(channels: ChannelGraph) -> int:
    """How many parameters compensation adds at most: a bias for every reader that has none, nor a norm behind it to take it."""
    products = (Product(channels.graph.get_submodule(own.layer)) for own in readers_of(channels).values() if own.norm is None)
    return sum(product.outputs for product in products if not product.has_bias)


def beyond_repair(channels: ChannelGraph) -> dict[str, str]:
    """Layer -> why compensation leaves it as it is, for what contracts channels and is no `Reader`."""
    graph = channels.graph
    known = readers_of(channels)
    uses = _uses(graph)
    reasons: dict[str, str] = {}
    for node in graph.graph.nodes:
        if is_product(graph, node) and node.name not in known:
            count = uses[str(node.target)]
            often = f"it is called {count} times with one weight"
            reasons[str(node.target)] = often if count > 1 else "its weight is used elsewhere, too"
    layers = {reader.layer for reader in known.values()}
    for labels, layer in channels.walk.labeler.read:
        if layer not in layers and layer not in reasons and (channels.grouping.group_of[labels] >= 0).any():
            reasons[layer] = "its weights are computed, or it is no convolution and no linear layer"
    return reasons


def _uses(graph: fx.GraphModule) -> Mapping[str, int]:
    return collections.Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def _shared(graph: fx.GraphModule) -> set[str]:
    """Layers whose parameters are those of another module as well, or are read by the graph itself."""
    owners: dict[int, set[str]] = {}
    for name, parameter in graph.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    read = {str(node.target).rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}
    several = {name for names in owners.values() if len(names) > 1 for name in names}
    return several | {name for name in read if name}


def _shortcut(layer: fx.Node, norm: fx.Node | None) -> fx.Node | None:
    """What is added to a layer's output, or to that of the norm behind it, where nothing else reads it."""
    last = norm or layer
    follower = _only_user(last)
    if follower is None or follower.op != "call_function" or follower.target not in _ADDS or follower.kwargs:
        return None
    others = [argument for argument in follower.args if argument is not last]
    if len(follower.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    return others[0] if shapes_of(others[0]) == shapes_of(last) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def norm_of(graph: fx.GraphModule, node: str | None) -> _Norm | None:
    """The batch norm that a node calls."""
    if node is None:
        return None
    return cast(_Norm, graph.get_submodule(next(str(n.target) for n in graph.graph.nodes if n.name == node)))


def affine(graph: fx.GraphModule, node: str | None, outputs: int) -> tuple[Tensor, Tensor]:
    """Scale and shift (outputs,) of a batch norm in eval mode, float64: `norm(y) = scale y + shift`; 1 and 0 without one."""
    norm = norm_of(graph, node)
    if norm is None:
        ones = torch.ones(outputs, dtype=torch.float64, device=device_of(graph))
        return ones, torch.zeros_like(ones)
    return scale_and_shift(norm)


def kept_channels(
    labels: IntArray | None, kept: Sequence[NDArray[np.bool_]], channels: ChannelGraph, size: int
) -> NDArray[np.bool_]:
    """Mask over a layer's channels: which of them stay."""
    return np.ones(size, dtype=bool) if labels is None else channels.kept_labels(labels, list(kept))


def inputs_read(channels: ChannelGraph, plan: Plan, masks: Sequence[NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """Node -> mask over a layer's original input channels, for the layers that a plan lets read a part of what stays.

    Raises:
        PlanError: A layer is not there, cannot read through a gather, or would read nothing; it is named.
    """
    if not plan.reads:
        return {}
    by_layer = {reader.layer: reader for reader in readers_of(channels).values()}
    found = {}
    for layer, indices in plan.reads:
        reader = by_layer.get(layer)
        product = Product(channels.graph.get_submodule(layer)) if reader else None
        if reader is None or product is None or product.blocks > 1:
            raise PlanError(f"`{layer}` cannot read a part of its inputs: it is no layer, or grouped, or called several times")
        if indices[-1] >= product.inputs:
            raise PlanError(f"`{layer}` has {product.inputs} input channels, the plan reads channel {indices[-1]}")
        chosen = np.zeros(product.inputs, dtype=bool)
        chosen[list(indices)] = True
        chosen &= kept_channels(reader.inputs, masks, channels, product.inputs)
        if not chosen.any():
            raise PlanError(f"the plan leaves `{layer}` nothing to read: it removes all of the channels that it reads")
        found[reader.node] = chosen
    return found


def columns_of(reader: Reader, group: ChannelGroup, channels: ChannelGraph) -> dict[int, Tensor]:
    """Block of a reader -> (units, columns per unit): the columns of each unit of a group there, -1 for none."""
    if reader.inputs is None:
        return {}
    product = Product(channels.graph.get_submodule(reader.layer))
    here = channels.grouping.group_of[reader.inputs] == channels.groups.index(group)
    unit = np.where(here, channels.grouping.unit_of[reader.inputs], -1)
    per_block = len(unit) // product.blocks
    found = {}
    for block in range(product.blocks):
        own = unit[block * per_block : (block + 1) * per_block]
        if (own >= 0).any():
            found[block] = _table(own, group.size, product.kernel)
    return found


def _table(unit: IntArray, units: int, kernel: int) -> Tensor:
    counts = np.bincount(unit[unit >= 0], minlength=units)
    table = np.full((units, int(counts.max())), -1, dtype=np.int64)
    order = np.argsort(unit, kind="stable")
    order = order[unit[order] >= 0]
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[unit[order], place] = order
    wide = table[:, :, None] * kernel + np.arange(kernel)
    return torch.from_numpy(np.where(table[:, :, None] < 0, -1, wide).reshape(units, -1))
