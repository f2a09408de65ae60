"""`MergeLayers`: two layers become one, once the activation between them is left out.

    k x k ──► act ──► 1 x 1         becomes    k x k         always exact
    1 x 1 ──► act ──► k x k                    k x k         exact without padding, or without a bias in front of it
    k x k ──► act ──► l x l                 (k + l - 1)²     exact without padding in the second

Two linear layers become one linear layer. Where the second layer pads with zeros, the first would have given its bias: such a pair
is refused, with the reason. *Merged = linearised* is the oracle. A merged layer is dense, and may cost more than the two did:
`merges_of` says how much, and only a measurement says whether it is faster (Kim et al., "LayerMerge", ICML 2024, choose by tables
of measured latencies; `tools/bench_merge.py`).
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressor.errors import PlanError
from compressor.passes.layers.product import is_product
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.base import PassResult
from compressor.passes.transforms.fold_batchnorm import FoldBatchNorm

aten = torch.ops.aten

_ACTIVATIONS = {
    aten.relu, aten.relu_, aten.relu6, aten.relu6_, aten.hardtanh, aten.hardtanh_, aten.silu, aten.silu_, aten.hardswish,
    aten.hardswish_, aten.gelu, aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_, aten.mish,
}  # fmt: skip
_Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Merge:
    """Two layers that could become one.

    Attributes:
        first: The layer in front.
        second: The layer that takes its place as well.
        activations: Nodes between them that are left out.
        macs: Multiply-accumulates for one sample of both, and of the one that they become.
        reason: Why they cannot become one exactly; empty where they can.
    """

    first: str
    second: str
    activations: tuple[str, ...]
    macs: tuple[int, int]
    reason: str = ""


def merges_of(gm: fx.GraphModule) -> tuple[Merge, ...]:
    """Every pair of layers with nothing but activations (and batch norms) between them, in the order of the graph."""
    graph = FoldBatchNorm()(gm).graph
    uses = _uses(graph)
    found = []
    for first, between, second in _pairs(graph):
        if uses[str(first.target)] > 1 or uses[str(second.target)] > 1:
            continue
        one, other = (cast(_Layer, graph.get_submodule(str(node.target))) for node in (first, second))
        positions = [_positions(node, layer) for node, layer in ((first, one), (second, other))]
        before = positions[0] * one.weight.numel() + positions[1] * other.weight.numel()
        after = positions[1] * _inputs(one) * _outputs(other) * _kernel(one, other)
        names = tuple(node.name for node in between)
        found.append(Merge(str(first.target), str(second.target), names, (before, after), _obstacle(one, other)))
    return tuple(found)


class MergeLayers:
    """Merge pairs of layers; batch norms of the graph are folded first.

    Args:
        seconds: The `second` of each `Merge`. Where a layer is the second of one and the first of another, all three become one.
    """

    def __init__(self, seconds: Collection[str]) -> None:
        self._seconds = tuple(seconds)

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return a graph with the layers merged, under the name of the last, and with the activations between them gone.

        Raises:
            PlanError: A layer has none in front that it could be merged with exactly; the reason is said.
        """
        if not self._seconds:
            return PassResult(gm, False)
        result = quiet_deepcopy(FoldBatchNorm()(gm).graph).eval()
        known = {merge.second: merge for merge in merges_of(result)}
        for name in self._seconds:
            if name not in known:
                raise PlanError(f"`{name}` has no layer in front of it with nothing but an activation between them")
        for first, between, second in list(_pairs(result)):  # from the front on: a merged layer may be the first of the next pair
            if str(second.target) not in self._seconds:
                continue
            one, other = (cast(_Layer, result.get_submodule(str(node.target))) for node in (first, second))
            if reason := _obstacle(one, other):
                raise PlanError(f"`{first.target}` and `{second.target}` cannot become one layer exactly: {reason}")
            _replace(result, str(second.target), merged(one, other))
            second.replace_input_with(second.all_input_nodes[0], first.all_input_nodes[0])
            for node in (*reversed(between), first):
                result.graph.erase_node(node)
        result.delete_all_unused_submodules()
        result.graph.lint()
        result.recompile()
        return PassResult(result, True)


def merged(one: _Layer, other: _Layer) -> _Layer:
    """The layer that gives what two give in a row; exact where `_obstacle` says nothing."""
    first, second = _dense(one), _dense(other)
    bias = None if other.bias is None else other.bias.detach().double()
    if one.bias is not None:
        moved = second.sum((2, 3)) @ one.bias.detach().double()
        bias = moved if bias is None else bias + moved
    if isinstance(one, nn.Linear) or isinstance(other, nn.Linear):
        weight = (second[:, :, 0, 0] @ first[:, :, 0, 0]).to(one.weight)
        layer: _Layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    else:
        # the kernel of two in a row is the convolution of theirs, all of it
        margin = [size - 1 for size in second.shape[2:]]
        weight = F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=margin).transpose(0, 1).to(one.weight)
        stride = [a * b for a, b in zip(one.stride, other.stride, strict=True)]
        padding = [a + b * s for a, b, s in zip(_padding(one), _padding(other), one.stride, strict=True)]
        outputs, inputs, *kernel = weight.shape
        layer = nn.Conv2d(inputs, outputs, tuple(kernel), tuple(stride), tuple(padding), bias=bias is not None)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            cast(Tensor, layer.bias).copy_(bias)
    return layer.to(one.weight.device)


def _inputs(layer: _Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: _Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _pairs(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, list[fx.Node], fx.Node]]:
    """A layer, what is between, and the layer behind it."""
    for node in graph.graph.nodes:
        if not _is_layer(graph, node):
            continue
        between: list[fx.Node] = []
        last = node
        while len(last.users) == 1:
            last = next(iter(last.users))
            if _is_layer(graph, last):
                if last.all_input_nodes == [(between or [node])[-1]]:
                    yield node, between, last
                break
            if getattr(last.target, "overloadpacket", None) not in _ACTIVATIONS:
                break
            between = [*between, last]


def _is_layer(graph: fx.GraphModule, node: fx.Node) -> bool:
    return is_product(graph, node) and isinstance(graph.get_submodule(str(node.target)), nn.Conv2d | nn.Linear)


def _uses(graph: fx.GraphModule) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            found[str(node.target)] = found.get(str(node.target), 0) + 1
    return found


def _obstacle(one: _Layer, other: _Layer) -> str:
    """Why two layers cannot become one exactly; empty where they can."""
    if isinstance(one, nn.Linear) != isinstance(other, nn.Linear):
        return "one is a convolution, the other is not"
    if isinstance(one, nn.Linear) or isinstance(other, nn.Linear):
        return ""
    for layer in (one, other):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or set(layer.dilation) != {1}:
            return "its padding or dilation is not plain"
    if set(other.kernel_size) == {1} and not any(_padding(other)):
        return ""
    if set(one.stride) != {1}:
        return "the first has a stride, and the second looks at more than one position"
    if not any(_padding(other)):
        return ""
    if any(_padding(one)) or set(one.kernel_size) != {1}:
        return "the second pads what the first would have gone on computing"
    if one.bias is not None and bool((one.bias != 0).any()):
        return "the second pads with zeros where the first would give its bias"
    return ""


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    return tuple(int(size) for size in layer.padding)


def _kernel(one: _Layer, other: _Layer) -> int:
    """Positions that the merged kernel looks at."""
    if isinstance(one, nn.Linear) or isinstance(other, nn.Linear):
        return 1
    return math.prod(a + b - 1 for a, b in zip(one.kernel_size, other.kernel_size, strict=True))


def _positions(node: fx.Node, layer: _Layer) -> int:
    """Of the output, for one sample."""
    (shape,) = shapes_of(node)[:1] or ((1, 1),)
    return math.prod(shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:])


def _dense(layer: _Layer) -> Tensor:
    """(outputs, inputs, height, width) in float64; groups as blocks among zeros."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        return weight[:, :, None, None]
    outputs, inputs, *kernel = weight.shape
    wide = weight.new_zeros(outputs, inputs * layer.groups, *kernel)
    size = outputs // layer.groups
    for group in range(layer.groups):
        rows, columns = slice(group * size, (group + 1) * size), slice(group * inputs, (group + 1) * inputs)
        wide[rows, columns] = weight[rows]
    return wide


def _replace(gm: fx.GraphModule, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(owner), leaf, module)
