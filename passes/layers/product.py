"""`Product`: a convolution or linear layer as `y = W x + b` on the patches that it reads.

    x (N, C, H, W) --pad, cut out at sampled positions--> patches (samples, blocks, C / blocks * kernel)
    y[:, g] = W[g] patches[:, g] + b[g]

Columns are ordered channel by channel, `kernel` of them each. Blocks are the groups of a grouped convolution, so a
depthwise one has as many as channels. A transposed convolution is an ordinary one, of stride 1 and with the kernel
flipped, of its input with zeros between the pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Conv: TypeAlias = nn.modules.conv._ConvNd
Transposed: TypeAlias = nn.modules.conv._ConvTransposeNd


class Product:
    """One layer.

    Args:
        module: An `nn.Conv1d` … `nn.Conv3d`, `nn.ConvTranspose1d` … `3d`, or `nn.Linear`.

    Attributes:
        blocks: Groups of a grouped convolution, else 1.
        kernel: Columns per input channel.
        channel_axis: Of the layer's input and output.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        conv = isinstance(module, Conv)
        self.blocks = cast(int, module.groups) if conv else 1
        self.kernel = math.prod(cast(tuple[int, ...], module.kernel_size)) if conv else 1
        self.channel_axis = 1 if conv else -1

    @property
    def inputs(self) -> int:
        """Input channels."""
        axis = 0 if isinstance(self.module, Transposed) else 1
        return int(self.weight.shape[axis]) * (1 if axis == 0 else self.blocks)

    @property
    def outputs(self) -> int:
        """Output channels."""
        return int(self.weight.shape[1]) * self.blocks if isinstance(self.module, Transposed) else int(self.weight.shape[0])

    @property
    def columns(self) -> int:
        """Columns of one block's matrix."""
        return self.inputs // self.blocks * self.kernel

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has outputs of its own: it goes with them, and they miss nothing."""
        return self.blocks > 1 and self.blocks == self.inputs

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored with its inputs first."""
        return isinstance(self.module, Transposed)

    @property
    def weight(self) -> Tensor:
        """The layer's weight as stored."""
        return cast(Tensor, self.module.weight)

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return cast(Tensor | None, self.module.bias) is not None

    @property
    def bias(self) -> Tensor:
        """(outputs,) float64; zeros where the layer has none."""
        bias = cast(Tensor | None, self.module.bias)
        return self.weight.new_zeros(self.outputs, dtype=torch.float64) if bias is None else bias.detach().double()

    def matrix(self) -> Tensor:
        """(blocks, outputs per block, columns), float64."""
        weight = self.weight.detach().double()
        if isinstance(self.module, Transposed):  # (in, out / groups, kernel…), and the kernel runs the other way
            weight = weight.flip(tuple(range(2, weight.dim())))
            weight = weight.reshape(self.blocks, self.inputs // self.blocks, weight.shape[1], self.kernel).transpose(1, 2)
        return weight.reshape(self.blocks, self.outputs // self.blocks, self.columns)

    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Store a matrix of the shape of `matrix()`, and a bias (outputs,) where one is given."""
        own = self.weight
        if isinstance(self.module, Transposed):
            wide = matrix.reshape(self.blocks, own.shape[1], self.inputs // self.blocks, self.kernel).transpose(1, 2)
            weight = wide.reshape(own.shape).flip(tuple(range(2, own.dim())))
        else:
            weight = matrix.reshape(own.shape)
        before = cast(Tensor | None, self.module.bias)
        with torch.no_grad():
            own.copy_(weight)
            if before is not None and bias is not None:
                before.copy_(bias)
            elif bias is not None:
                self.module.bias = nn.Parameter(bias.to(own))

    def patches(self, x: Tensor, at: Tensor) -> Tensor:
        """What the layer reads at some positions of its output.

        Args:
            x: The layer's input, (N, C, …) or for a linear layer (N, …, C).
            at: (K, axes) positions; see `sample`.

        Returns:
            (N * K, blocks, columns).
        """
        if not isinstance(self.module, Conv):
            return self.values(x, at)[:, None]
        x = _spread(x, self.module) if isinstance(self.module, Transposed) else _padded(x, self.module)
        kernel, dilation = self.module.kernel_size, self.module.dilation
        stride = (1,) * len(kernel) if isinstance(self.module, Transposed) else self.module.stride
        flat = torch.zeros(len(at), self.kernel, dtype=torch.long)
        offsets = torch.cartesian_prod(*[torch.arange(k) for k in kernel]).reshape(self.kernel, len(kernel))
        for axis, size in enumerate(x.shape[2:]):
            flat = flat * size + at[:, axis, None] * stride[axis] + offsets[None, :, axis] * dilation[axis]
        cut = x.flatten(2)[:, :, flat.to(x.device)]  # (N, C, K, kernel)
        return cut.transpose(1, 2).reshape(-1, self.blocks, self.columns)

    def portion(self, positions: int, memory_bytes: int) -> int:
        """How many images may be cut into patches at a time, as float32 and as float64."""
        return max(memory_bytes // (12 * positions * self.blocks * self.columns), 1)

    def values(self, y: Tensor, at: Tensor) -> Tensor:
        """The channels of a tensor shaped like the layer's output, (N * K, channels), at some positions."""
        if self.channel_axis == 1:
            y = y.movedim(1, -1)
        flat = torch.zeros(len(at), dtype=torch.long)
        for axis, size in enumerate(y.shape[1:-1]):
            flat = flat * size + at[:, axis]
        return y.reshape(len(y), -1, y.shape[-1])[:, flat.to(y.device)].flatten(0, 1)

    def grid(self, output: Sequence[int]) -> tuple[int, ...]:
        """The positions of an output of this shape: all axes but batch and channels."""
        return tuple(output[2:] if self.channel_axis == 1 else output[1:-1])


def sample(grid: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Positions drawn without replacement, (K, axes); all of them, in order, where there are no more than `count`."""
    total = math.prod(grid)
    chosen = torch.arange(total) if total <= count else torch.randperm(total, generator=generator)[:count]
    if not grid:
        return chosen[:, None][:, :0]
    return torch.stack(torch.unravel_index(chosen, tuple(grid)), dim=1)


def is_product(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a layer that `Product` takes."""
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Conv | nn.Linear)


def take_state(graph: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Load a `state_dict`, the biases that compensation gave to layers without one among it.

    Raises:
        RuntimeError: It is that of another network.
    """
    own = graph.state_dict()
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        if name not in own and leaf == "bias" and f"{layer}.weight" in own:
            module = graph.get_submodule(layer)
            if isinstance(module, Conv | nn.Linear):
                module.bias = nn.Parameter(tensors[name].to(module.weight))
    graph.load_state_dict(dict(tensors))


def _padded(x: Tensor, conv: Conv) -> Tensor:
    return F.pad(x, conv._reversed_padding_repeated_twice, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def _spread(x: Tensor, conv: Transposed) -> Tensor:
    """Zeros between the pixels and around them, so that a plain convolution of stride 1 gives the outputs."""
    stride, dilation, kernel = conv.stride, conv.dilation, conv.kernel_size
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *[slice(None, None, s) for s in stride])] = x
    amounts: list[int] = []
    for d, k, p, extra in zip(dilation, kernel, cast(tuple[int, ...], conv.padding), conv.output_padding, strict=True):
        amounts = [d * (k - 1) - p, d * (k - 1) - p + extra, *amounts]  # F.pad counts from the last axis
    return F.pad(wide, amounts)
