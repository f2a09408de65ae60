"""`FactorizeConv`: convolutions and linear layers as sequences of smaller ones, in one of several forms (`forms/`).

A layer `conv` becomes `conv.0`, `conv.1`, …, an `nn.Sequential` under its name; what lies between the stages are channels like
any other: analysed again, ranks are channel groups that can be removed. Strides, padding and dilation go to the stages that
run over their axis, groups to all of them, and the bias to the last (none may come before a padding).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.passes.layers.factorizable import blocks_of, form_of, node_of, sizes_of
from compressor.passes.layers.forms import Form, Stage, StageSizes, compose
from compressor.passes.layers.product import Conv, Transposed
from compressor.passes.tracing.shapes import VALUE, shapes_of
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.base import PassResult
from compressor.values.plan import Factorization

logger = logging.getLogger(__name__)

STAGES = "factorized_stages"
"""In a node's meta: the stages of every block that amount to the layer's weight, where these are known (`rank_reduction.py`)."""

_STACK = "nn_module_stack"  # torch.export's: key -> (path of a module, its type), the innermost last
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_SAME = 1e-4  # of the largest weight: known stages that are farther off are of an earlier weight
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class FactorizeConv:
    """A pass.

    Args:
        factors: What to factorize, how, and with which ranks.
        weights: Whether the stages are to be computed; without it they are only given their shapes (and zeros), for weights that
            are loaded afterwards.
    """

    def __init__(self, factors: Sequence[Factorization], weights: bool = True) -> None:
        self._factors, self._weights = tuple(factors), weights

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return the graph with sequences in place of layers; `gm` is not changed.

        Raises:
            PlanError: A layer is not there, is called several times, cannot take the form, or a rank is too large; it is named.
        """
        if not self._factors:
            return PassResult(gm, False)
        nodes = {one.layer: node_of(gm, one.layer) for one in self._factors}
        result = quiet_deepcopy(gm)
        by_name = {node.name: node for node in result.graph.nodes}
        for one in self._factors:
            layer = gm.get_submodule(one.layer)
            form = form_of(one, sizes_of(layer))
            stages = _stages(form, layer, one.ranks, self._weights, nodes[one.layer].meta.get(STAGES))
            modules = [_module(layer, own, k == len(stages) - 1) for k, own in enumerate(stages)]
            _insert(result, by_name[nodes[one.layer].name], one.layer, modules)
        result.graph.lint()
        result.recompile()
        logger.info("FactorizeConv: %d layers", len(self._factors))
        return PassResult(result, True)


@dataclass(frozen=True)
class _Stacked:
    """A stage of all blocks: (blocks, outputs, inputs, *kernel)."""

    sizes: StageSizes
    weight: Tensor


def _stages(
    form: Form, layer: nn.Module, ranks: Sequence[int], weights: bool, known: Sequence[Sequence[Stage]] | None
) -> list[_Stacked]:
    sizes, blocks = sizes_of(layer), blocks_of(layer)
    kernel = sizes.kernel
    found: Sequence[Sequence[Stage]] = []
    if weights:
        wanted = form.stages(sizes, ranks)
        fits = known is not None and all([stage.sizes for stage in own] == wanted for own in known) and _amount_to(known, blocks)
        found = known if known is not None and fits else [form.factorize(block, ranks) for block in blocks]
    stacked = []
    for k, own in enumerate(form.stages(sizes, ranks)):
        if weights:
            weight = torch.from_numpy(np.stack([stages[k].weight for stages in found]))
        else:
            shape = [size if axis in own.axes else 1 for axis, size in enumerate(kernel)]
            weight = torch.zeros(len(blocks), own.outputs, 1 if own.depthwise else own.inputs, *shape, dtype=torch.float64)
        stacked.append(_Stacked(own, weight))
    return stacked


def _amount_to(stages: Sequence[Sequence[Stage]], blocks: np.ndarray) -> bool:
    """Whether sequences are those of a weight, (blocks, outputs, inputs, *kernel)."""
    found = np.stack([compose(own) for own in stages])
    return found.shape == blocks.shape and float(np.abs(found - blocks).max()) <= _SAME * float(np.abs(blocks).max())


def _module(layer: nn.Module, stage: _Stacked, last: bool) -> nn.Module:
    """A layer of a sequence; it takes the original's bias if it is the last."""
    weight = cast(Tensor, layer.weight)
    bias = cast("Tensor | None", layer.bias) if last else None
    module: nn.Module
    if isinstance(layer, Conv):
        module, own = _conv(layer, stage, bias is not None)
    else:
        module = nn.Linear(stage.sizes.inputs, stage.sizes.outputs, bias=bias is not None, device="meta")
        own = stage.weight[0]
    module.weight = nn.Parameter(own.to(weight), weight.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return module.train(layer.training)


def _conv(layer: Conv, stage: _Stacked, bias: bool) -> tuple[nn.Module, Tensor]:
    sizes, rank = stage.sizes, len(layer.kernel_size)
    transposed = isinstance(layer, Transposed) and bool(sizes.axes)
    groups = layer.groups * (sizes.outputs if sizes.depthwise else 1)

    def along(values: object, other: int) -> tuple[int, ...]:
        own = cast("tuple[int, ...]", values)
        return tuple(value if axis in sizes.axes else other for axis, value in enumerate(own))

    padding = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
    options: dict[str, object] = {
        "stride": along(layer.stride, 1), "padding": padding, "dilation": along(layer.dilation, 1), "groups": groups,
        "bias": bias, "padding_mode": layer.padding_mode if sizes.axes else "zeros", "device": "meta",
    }  # fmt: skip
    if isinstance(padding, str) and not sizes.axes:
        options["padding"] = 0
    if transposed:
        options["output_padding"] = along(layer.output_padding, 0)
    kind = (_TRANSPOSED if transposed else _CONVS)[rank]
    inputs, outputs = layer.groups * sizes.inputs, layer.groups * sizes.outputs
    module = kind(inputs, outputs, along(layer.kernel_size, 1), **options)  # type: ignore[arg-type]
    weight = stage.weight.transpose(1, 2) if transposed and not sizes.depthwise else stage.weight
    return module, weight.reshape(math.prod(weight.shape[:2]), *weight.shape[2:]).contiguous()


def _insert(gm: fx.GraphModule, node: fx.Node, layer: str, modules: Sequence[nn.Module]) -> None:
    """Replace the layer that a node calls by a sequence, one node per stage, with the shapes in between."""
    path, _, leaf = layer.rpartition(".")
    setattr(gm.get_submodule(path), leaf, nn.Sequential(*modules))
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    output = shapes_of(node)
    for k, module in enumerate(modules):
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(f"{layer}.{k}", (source,))
        new.meta = dict(node.meta)
        # what an exporter reads which layer a node comes from: engines tell their times by it
        new.meta[_STACK] = {**(node.meta.get(_STACK) or {}), str(new.target): (str(new.target), _qualified(module))}
        if k < len(modules) - 1:
            new.meta[VALUE] = _shape_after(module, shapes_of(source)[0])
        else:
            new.meta[VALUE] = output[0]
        source = new
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)


def _qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _shape_after(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a layer's output; nothing is computed."""
    state = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    output = torch.func.functional_call(module, state, torch.empty(tuple(shape), device="meta"))
    return tuple(cast(Tensor, output).shape)
