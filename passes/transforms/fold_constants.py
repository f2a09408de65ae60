"""`FoldConstants`: what removed channels would have added if they were constant, in the bias of who reads them.

A channel whose batch norm has the scale 0 emits one number, its shift sent through the activation: that
number times the weights is a constant of the next layer, and belongs into its bias. Pruning treats every removed
channel so (its scale is taken as 0), instead of taking its contribution as 0:

    y = Σ_kept W_k x_k + Σ_removed W_c x_c      with x_c = act(shift_c), a constant:
    y = Σ_kept W_k x_k + (b + Σ_removed (W_c * act(shift_c)))

Nothing is derived symbolically. The original graph, its removed scales set to 0, is run; whatever a reader sees
constant in a removed channel is pushed through that reader alone. If what comes out is one number per output
channel, the fold is exact; if not (a constant other than 0 inside a zero padding differs at the border), the
layer is left alone and named.
"""

import collections
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.labels.labeler import IntArray, Value
from compressor.passes.labels.rules import key_of
from compressor.passes.tracing.trace import example_inputs_of, quiet_deepcopy
from compressor.passes.transforms.base import PassResult
from compressor.passes.transforms.verify import READERS
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)

_FLAT = 1e-4
"""How far a channel may vary, relative to its size, and still count as constant in float32: a batch norm of scale 0 is
constant to the bit, what follows (an interpolation, an average) may round."""


@dataclass(frozen=True)
class Folding:
    """What was folded.

    Attributes:
        graph: The narrowed graph with the new biases.
        folded: Layers whose bias (or, where a batch norm follows a layer without bias, whose running mean) changed.
        skipped: Layer -> why the removed channels that it reads could not be folded; they count as 0 there.
    """

    graph: fx.GraphModule
    folded: tuple[str, ...]
    skipped: Mapping[str, str]


class FoldConstants:
    """Fold the constants of removed channels into the biases of their readers.

    Args:
        plan: The plan that was applied.
        channels: The analysis of the graph that it was applied to.
    """

    def __init__(self, plan: Plan, channels: ChannelGraph) -> None:
        self._plan = plan
        self._channels = channels

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return a copy of the narrowed graph `gm` with the constants folded; see `fold_constants`."""
        folding = fold_constants(self._channels, self._plan, gm)
        return PassResult(folding.graph, bool(folding.folded))


def silenced(channels: ChannelGraph, plan: Plan) -> fx.GraphModule:
    """The original graph in eval mode with the scales (batch norm weights) of removed channels set to 0."""
    twin = quiet_deepcopy(channels.graph).eval()
    kept_of = channels.keeper(channels.kept_masks(plan))
    tensors = dict(twin.named_parameters())
    with torch.no_grad():
        for name in channels.walk.labeler.scales:
            slot = channels.walk.labeler.slots.get((name, 0))
            if slot is not None and name in tensors:
                tensors[name][torch.from_numpy(~kept_of(slot.labels))] = 0
    return twin


def fold_constants(channels: ChannelGraph, plan: Plan, small: fx.GraphModule) -> Folding:
    """See the module. `small` is not changed.

    Args:
        channels: Analysis of the original graph.
        plan: The plan.
        small: The graph that the plan gave, in which every layer still has its name.

    Raises:
        PlanError: The plan does not fit.
        PassError: `small` is not what the plan gave.
    """
    kept_of = channels.keeper(channels.kept_masks(plan))
    twin = silenced(channels, plan)
    observer = _Observer(twin, channels)
    with torch.no_grad():
        for seed in (0, 1):
            inputs = example_inputs_of(channels.graph, seed=seed)
            observer.run(*twin.graph.process_inputs(*inputs), enable_io_processing=False)
    result = quiet_deepcopy(small)
    folded, skipped = [], {}
    for name, (low, high) in observer.ranges.items():
        call = channels.walk.calls[name]
        axis = _contracted(call.tensor("input"), call.module)
        gone = torch.from_numpy(~kept_of(call.tensor("input").axes[axis]))
        if not bool(gone.any()):
            continue
        layer = call.layer
        varies = ((high - low).abs() > _FLAT * torch.maximum(high.abs(), low.abs()).clamp(min=1e-6)) & gone
        if bool(varies.any()):
            skipped[layer] = f"{int(varies.sum())} of the {int(gone.sum())} removed channels that it reads are not constant"
            continue
        constant = torch.where(gone, (high + low) / 2, torch.zeros_like(low))
        outputs = channels.walk.values[name][0].axes.get(axis)
        stays = None if outputs is None else torch.from_numpy(kept_of(outputs))
        reason = _fold(result, name, cast(nn.Module, call.module), constant, observer.shapes[name], axis, stays)
        if reason is None:
            folded.append(layer)
        else:
            skipped[layer] = reason
    skipped.update(_other_readers(channels, kept_of))
    logger.info("FoldConstants: %d layers folded, %d left alone", len(folded), len(skipped))
    for layer, reason in skipped.items():
        logger.info("FoldConstants: %s: %s", layer, reason)
    return Folding(result, tuple(folded), skipped)


def _other_readers(channels: ChannelGraph, kept_of: Callable[[IntArray], NDArray[np.bool_]]) -> dict[str, str]:
    """Functions in which removed channels end: sums, products of tensors, convolutions with computed weights."""
    found = {}
    for name, call in channels.walk.calls.items():
        if call.module is not None or key_of(call.node, None) not in READERS:
            continue
        ids = channels.grouping.group_of, channels.grouping.unit_of
        before = {pair for value in call.values for pair in _gone(value, kept_of, *ids)}
        after = {pair for value in channels.walk.values[name] for pair in _gone(value, kept_of, *ids)}
        if before - after:
            found[name] = f"{call.op} reads {len(before - after)} removed channels; only convolutions and linear layers are folded"
    return found


def _gone(
    value: Value, kept_of: Callable[[IntArray], NDArray[np.bool_]], group_of: IntArray, unit_of: IntArray
) -> set[tuple[int, int]]:
    """Group and unit of everything that is removed from a tensor."""
    removed = [labels[~kept_of(labels)] for labels in value.axes.values()]
    return {(int(group_of[k]), int(unit_of[k])) for labels in removed for k in labels}


class _Observer(fx.Interpreter):
    """Runs a graph and keeps, for every layer that contracts channels, the range of each input channel."""

    def __init__(self, twin: fx.GraphModule, channels: ChannelGraph) -> None:
        super().__init__(twin)
        self._channels = channels
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Look at the input of convolutions and linear layers."""
        call = self._channels.walk.calls.get(n.name)
        if call is not None and isinstance(call.module, nn.modules.conv._ConvNd | nn.Linear):
            value = call.tensor("input")
            axis = _contracted(value, call.module)
            if axis in value.axes:
                self._look(n.name, self.fetch_args_kwargs_from_env(n)[0][0], axis)
        return super().run_node(n)

    def _look(self, name: str, x: Tensor, axis: int) -> None:
        others = [a for a in range(x.dim()) if a != axis]
        low, high = x.amin(others), x.amax(others)
        if name in self.ranges:
            low, high = torch.minimum(low, self.ranges[name][0]), torch.maximum(high, self.ranges[name][1])
        self.ranges[name] = low, high
        self.shapes[name] = x.shape


def _contracted(value: Value, module: nn.Module | None) -> int:
    return len(value.shape) - 1 if isinstance(module, nn.Linear) else 1


def _fold(
    gm: fx.GraphModule, name: str, original: nn.Module, constant: Tensor, shape: torch.Size, axis: int, stays: Tensor | None
) -> str | None:
    """Push the constants through one layer and add what comes out to its bias; a reason where that is not exact."""
    layout = [1] * len(shape)
    layout[axis] = len(constant)
    x = constant.view(layout).expand(1, *shape[1:])
    with torch.no_grad():
        moved = (original(x) - original(torch.zeros_like(x))).movedim(axis, 0).flatten(1)
    if stays is not None:
        moved = moved[stays]
    spread = (moved.amax(1) - moved.amin(1)).max()
    if spread > _FLAT * moved.abs().max().clamp(min=1e-6):
        return f"its zero padding sees a border: the constant would be off by up to {float(spread):.2g} there"
    node = next(n for n in gm.graph.nodes if n.name == name)
    module = gm.get_submodule(str(node.target))
    change = moved.mean(1)
    bias = cast(nn.Parameter | None, module.bias)
    uses = collections.Counter(str(other.target) for other in gm.graph.nodes if other.op == "call_module")
    following = [gm.get_submodule(str(n.target)) for n in node.users if n.op == "call_module" and uses[str(n.target)] == 1]
    if uses[str(node.target)] > 1:
        return "it is used several times, with other constants each time"
    with torch.no_grad():
        if bias is not None:
            bias.add_(change)
        elif len(node.users) == len(following) == 1 and _tracks(following[0]):
            cast(Tensor, following[0].running_mean).sub_(change)
        else:
            module.bias = nn.Parameter(change.clone())
    return None


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
