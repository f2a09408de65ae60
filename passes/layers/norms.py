"""The batch norm behind a layer: which can become part of it, and the weights that it then has.

    y = (W * x + b - mean) scale / sqrt(var + eps) + shift
      = (W s) * x + (b - mean) s + shift        with s = scale / sqrt(var + eps)

(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3.2.)
"""

import collections
from collections.abc import Iterator
from typing import TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from compressor.passes.tracing.shapes import shapes_of

Norm: TypeAlias = nn.modules.batchnorm._BatchNorm
_Conv: TypeAlias = nn.modules.conv._ConvNd
_Transposed: TypeAlias = nn.modules.conv._ConvTransposeNd


def foldable(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every `(layer, norm)` that can become one layer, in the order of the graph."""
    uses = collections.Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    for norm in gm.graph.nodes:
        if norm.op != "call_module" or not _fixed(gm.get_submodule(norm.target)):
            continue
        layer = norm.args[0] if norm.args else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or len(layer.users) != 1:
            continue
        module = gm.get_submodule(str(layer.target))
        if uses[str(layer.target)] == uses[norm.target] == 1 and _takes(module, layer):
            yield layer, norm


def _fixed(module: nn.Module) -> bool:
    """A batch norm that uses running statistics in eval mode."""
    return isinstance(module, Norm) and module.running_mean is not None and module.running_var is not None


def _takes(module: nn.Module, layer: fx.Node) -> bool:
    if isinstance(module, nn.Linear):  # with more axes the norm's channels would not be the features
        return all(len(shape) == 2 for shape in shapes_of(layer))
    return isinstance(module, _Conv)


def folded(module: nn.Module, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with its batch norm folded in, computed in float64.

    Args:
        module: A convolution (transposed ones too) or a linear layer.
        norm: The batch norm behind it.

    Returns:
        Weight of the layer's shape and bias (out channels,), of the weight's type.
    """
    weight = cast(Tensor, module.weight).detach()
    scale, shift = scale_and_shift(norm)
    bias = cast(Tensor | None, module.bias)
    before = torch.zeros_like(scale) if bias is None else bias.detach().double()
    if isinstance(module, _Transposed):  # (in, out / groups, ...): each block of inputs has its own outputs
        per_block = scale.view(module.groups, 1, -1)
        factor = per_block.expand(-1, weight.shape[0] // module.groups, -1).reshape(weight.shape[0], weight.shape[1])
    else:
        factor = scale.view(-1, 1).expand(-1, weight.shape[1])
    wide = factor.reshape(*factor.shape, *[1] * (weight.dim() - 2))
    return (weight.double() * wide).to(weight.dtype), (before * scale + shift).to(weight.dtype)


def scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics does in eval mode, `norm(y) = scale y + shift`; (channels,) each, float64."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = norm.bias.detach().double() if norm.bias is not None else torch.zeros_like(mean)
    return scale, shift - scale * mean
