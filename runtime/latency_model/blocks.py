"""Blocks: the units a back end really fuses, and how wide they are in a structure.

A block is a convolution or linear layer with what follows it on its own (norm, activation, addition, pooling). Its
latency depends on how many channels it reads and makes, and on its *kind*: kernel, stride, positions, and
what follows. Blocks of one kind share their measurements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.search_space import SearchSpace, ranks_of
from compressor.passes.tracing.shapes import shapes_of
from compressor.runtime.backends.base import LayerTime

Kind = tuple[object, ...]


@dataclass(frozen=True)
class Block:
    """One block of a network.

    Attributes:
        name: The layer it begins with.
        kind: What its latency depends on besides the widths.
        reads: Channels it reads in the whole network.
        makes: Channels it makes.
        depthwise: Whether every channel is computed from itself alone.
        instead_of: The layer that it is a part of, where it is one of a sequence.
        node: The node that calls the layer.
    """

    name: str
    kind: Kind
    reads: int
    makes: int
    depthwise: bool
    instead_of: str = ""
    node: str = ""


def blocks_of(channels: ChannelGraph) -> tuple[Block, ...]:
    """All blocks of a network, in the order of the graph; a layer that is used several times is one block per use."""
    found: list[Block] = []
    ranked = {axis.layer for axis in ranks_of(channels)}
    for node in channels.graph.graph.nodes:
        module = channels.graph.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        if isinstance(module, nn.Linear):
            reads, makes, own = module.in_features, module.out_features, ("linear",)
        else:
            reads, makes = module.in_channels, module.out_channels
            depthwise = module.groups > 1 and module.groups == reads
            groups = "depthwise" if depthwise else module.groups
            own = (type(module).__name__, *module.kernel_size, *module.stride, *module.dilation, groups)  # type: ignore[assignment]
        (shape,) = shapes_of(node)[:1] or ((),)
        tail = _tail(node, channels.graph)
        found.append(Block(str(node.target), (*own, *shape[2:], *tail), reads, makes, "depthwise" in own, "", node.name))
        if str(node.target) in ranked:
            found += _stages(found[-1], own, shape[2:], tail)
    return tuple(found)


def _stages(block: Block, own: Kind, positions: Sequence[int], tail: Sequence[str]) -> list[Block]:
    """The two layers of a sequence in place of one."""
    first = Block(f"{block.name}.0", (*own, *positions, "first of two"), block.reads, 0, False, block.name, block.node)
    last = Block(f"{block.name}.1", ("1x1", *positions, *tail), 0, block.makes, False, block.name, block.node)
    return [first, last]


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Dropout, nn.Identity)


def _tail(node: fx.Node, graph: fx.GraphModule) -> tuple[str, ...]:
    """The ops behind a layer up to the next layer or fork."""
    names = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), _NORMS):
            continue
        if node.op != "call_function":
            break
        names.append(str(node.target).split(".")[1] if "." in str(node.target) else str(node.target))
    return tuple(names)


def widths_in(channels: ChannelGraph, blocks: Sequence[Block], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How wide every block is in structures.

    Args:
        channels: The analysis of the network.
        blocks: Its blocks.
        rows: (structures, groups): the width of every group.

    Returns:
        (structures, blocks, 2): channels read and made; 0 where a structure has no such block, or a branch with it is gone.
    """
    if isinstance(channels, SearchSpace):
        return _in_space(channels, blocks, rows)
    found = np.empty((len(rows), len(blocks), 2), dtype=np.int64)
    slots = channels.walk.labeler.slots
    asked: list[tuple[str, int]] = []
    places: list[tuple[int, int, int]] = []
    for k, block in enumerate(blocks):
        made, read = _axes(channels, block)
        for column, axis, whole in ((1, made, block.makes), (0, made if block.depthwise else read, block.reads)):
            slot = slots.get((f"{block.name}.weight", axis))
            if slot is None:
                found[:, k, column] = whole
                continue
            asked.append((slot.name, axis))
            places.append((k, column, 1 if block.depthwise else slot.blocks))
    if asked:
        lengths = channels.costs.axis_lengths(asked, rows)
        for n, (k, column, factor) in enumerate(places):
            found[:, k, column] = lengths[:, n] * factor
    return found


def _in_space(channels: SearchSpace, blocks: Sequence[Block], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same where branches may be gone, and layers sequences: a layer is there as itself, or as its two stages."""
    plain = [block for block in blocks if not block.instead_of]
    widths = widths_in(channels.plain, plain, rows[:, : len(channels.grouping.groups)])
    of_layer = {block.name: widths[:, k] for k, block in enumerate(plain)}
    ranks = dict(zip((axis.layer for axis in channels.ranks), channels.costs.ranks(rows).T, strict=True))
    found = np.zeros((len(rows), len(blocks), 2), dtype=np.int64)
    for k, block in enumerate(blocks):
        layer = block.instead_of or block.name
        rank = ranks.get(layer, np.zeros(len(rows), dtype=np.int64))
        own = of_layer[layer].copy()
        if block.instead_of:
            own[:, 1 if block.name.endswith(".0") else 0] = rank
        found[:, k] = np.where(((rank > 0) == bool(block.instead_of))[:, None], own, 0)
    there = rows[:, rows.shape[1] - len(channels.depth) :]
    for axis, column in zip(channels.depth, there.T, strict=True):
        held = [k for k, block in enumerate(blocks) if block.node in axis.branch.nodes]
        found[np.ix_(column == 0, held)] = 0
    return found


def _axes(channels: ChannelGraph, block: Block) -> tuple[int, int]:
    """Axes of the weight that hold the channels made and read."""
    transposed = isinstance(channels.graph.get_submodule(block.name), nn.modules.conv._ConvTransposeNd)
    return (1, 0) if transposed and not block.depthwise else (0, 1)


def times_by_block(blocks: Sequence[Block], layers: Sequence[LayerTime]) -> tuple[dict[str, float], float]:
    """Sum an engine's layers into blocks.

    Args:
        blocks: The network's blocks.
        layers: What the engine says.

    Returns:
        Milliseconds per block, and of layers that belong to none.
    """
    names = {block.name for block in blocks}
    times: dict[str, float] = {}
    rest = 0.0
    for layer in layers:
        owners = [module for module in layer.modules if module in names]
        for owner in owners:
            times[owner] = times.get(owner, 0.0) + layer.median_ms / len(owners)
        rest += 0.0 if owners else layer.median_ms
    return times, rest


def by_kind(blocks: Sequence[Block]) -> Mapping[Kind, list[int]]:
    """Kind -> indices of its blocks."""
    found: dict[Kind, list[int]] = {}
    for k, block in enumerate(blocks):
        found.setdefault(block.kind, []).append(k)
    return found
