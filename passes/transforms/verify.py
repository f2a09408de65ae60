"""The oracle: *removed = masked*.

Removing channels must give the same outputs as keeping them and setting them to zero at every place that
reads them. The masked network is the original graph, run with a mask in front of every op that contracts
channels; it knows nothing of how parameters were narrowed or constants edited. What computes statistics over
channels (a layer norm, a mean over channels) computes them over those that stay: that one op is run on them
alone, and its result is put back among zeros.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.errors import PassError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import inputs_read
from compressor.passes.labels.labeler import IntArray, Value
from compressor.passes.layers.product import Product
from compressor.passes.tracing.modes import full_float32
from compressor.passes.tracing.trace import BATCH, DYNAMIC, device_of, example_inputs_of, outputs_of
from compressor.passes.transforms.remove_branches import branches_named
from compressor.passes.transforms.update_attributes import fit
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)
aten = torch.ops.aten

TOLERANCE = 1e-4
"""Relative error allowed between removed and masked in float32: the same products are summed in another
order, which costs some 1e-7 per layer; a wrong channel costs 1e-2 or more."""

READERS: dict[object, int] = {  # how many of the first arguments are contracted
    aten.conv1d: 1, aten.conv2d: 1, aten.conv3d: 1,
    aten.conv_transpose1d: 1, aten.conv_transpose2d: 1, aten.conv_transpose3d: 1,
    aten.linear: 1, aten.sum: 1, aten.matmul: 2, aten.bmm: 2, aten.baddbmm: 3, aten.addmm: 3,
    aten.scaled_dot_product_attention: 3, aten.einsum: 2,
}  # fmt: skip
_READING_MODULES = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Verification:
    """What the oracle found.

    Attributes:
        relative_error: Largest ||removed - masked|| / ||masked|| over the outputs.
        lossy: Ops that compute statistics over channels that the plan narrows; the oracle computes them
            over those that stay, as the narrowed graph does.
    """

    relative_error: float
    lossy: tuple[str, ...]


class _Masked(fx.Interpreter):
    """Runs the original graph with removed channels set to zero wherever they are read."""

    def __init__(self, channels: ChannelGraph, masks: list[NDArray[np.bool_]], plan: Plan) -> None:
        super().__init__(channels.graph)
        self._channels = channels
        self._kept_of = channels.keeper(masks)
        self._parts = inputs_read(channels, plan, masks)
        self._shortcuts = {branch.at: branch.shortcut for branch in branches_named(channels.branches, plan.removed)}
        self._nodes = {node.name: node for node in channels.graph.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        """Mask the tensor arguments of ops that contract channels; run those that count channels on what stays."""
        if n.name in self._shortcuts:
            return self.env[self._nodes[self._shortcuts[n.name]]].clone()  # a later op may write to the one of the two
        if n.name in self._channels.walk.labeler.statistics:
            return self._over_what_stays(n)
        if not self._reads(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = self._channels.walk.calls[n.name]
        count = READERS.get(getattr(n.target, "overloadpacket", None), 1)
        args = tuple(
            self._mask_any(a, value) if k < count else a
            for k, (a, value) in enumerate(zip(args, call.arguments.values(), strict=False))
        )
        if n.name in self._parts:
            args = (self._part(args[0], n), *args[1:])
        return getattr(self, n.op)(n.target, args, kwargs)

    def _part(self, x: Tensor, node: fx.Node) -> Tensor:
        """Zeros where a layer that reads a part of a stream does not look."""
        mask = torch.from_numpy(self._parts[node.name]).to(x.device)
        axis = Product(self._channels.graph.get_submodule(str(node.target))).channel_axis % x.dim()
        return x * mask.view([-1 if k == axis else 1 for k in range(x.dim())])

    def _mask_any(self, argument: Any, value: object) -> Any:
        if isinstance(value, Value):
            return self._mask(argument, value)
        if isinstance(argument, list | tuple) and isinstance(value, list):
            return [self._mask_any(a, v) for a, v in zip(argument, value, strict=True)]
        return argument

    def _reads(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._channels.graph.get_submodule(str(node.target)), _READING_MODULES)
        return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in READERS

    def _over_what_stays(self, node: fx.Node) -> Any:
        call = self._channels.walk.calls[node.name]
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if call.module is not None:
            module = copy.deepcopy(call.module)
            for name, value in call.arguments.items():
                if name != "input" and isinstance(value, Value):
                    tensor = self._narrow(getattr(module, name), value)
                    setattr(module, name, nn.Parameter(tensor) if isinstance(getattr(module, name), nn.Parameter) else tensor)
            fit(module)
            if isinstance(module, nn.GroupNorm):  # statistics per block: each of them has shrunk
                module.num_groups = cast(nn.GroupNorm, call.module).num_groups
            result = module(self._narrow(args[0], call.tensor("input")))
        else:
            known = list(call.arguments.values())
            args = tuple(self._narrow(a, v) if isinstance(v, Value) else a for a, v in zip(args, known, strict=False))
            if getattr(node.target, "overloadpacket", None) in (aten.layer_norm, aten.rms_norm):
                args = (args[0], list(args[0].shape[-len(args[1]) :]), *args[2:])
            result = cast(Any, node.target)(*args, **kwargs)
        outputs = self._channels.walk.values[node.name]
        if isinstance(result, Tensor):
            return self._put_back(result, outputs[0])
        return [self._put_back(x, value) for x, value in zip(result, outputs, strict=True)]

    def _kept(self, labels: IntArray, size: int) -> NDArray[np.bool_]:
        """What stays along an axis; where a view has folded the batch into it, as many samples as there are now."""
        kept = self._kept_of(labels)
        if size == len(labels):
            return kept
        batch = cast(int, self._channels.graph.meta[BATCH])
        outer = labels.reshape(batch, -1)
        if (outer == outer[0]).all():
            return np.resize(kept[: outer.shape[1]], size)
        return np.repeat(kept[::batch], size * batch // len(labels))

    def _narrow(self, x: Tensor, value: Value) -> Tensor:
        for axis, labels in value.axes.items():
            kept = self._kept(labels, x.shape[axis])
            if not kept.all():
                x = x.index_select(axis, torch.from_numpy(np.flatnonzero(kept)).to(x.device))
        return x

    def _put_back(self, x: Tensor, value: Value) -> Tensor:
        for axis, labels in value.axes.items():
            kept = self._kept_of(labels)
            if not kept.all():
                size = x.shape[axis] * len(kept) // int(kept.sum())  # more than it was where samples are folded in
                kept = self._kept(labels, size)
                shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
                x = x.new_zeros(shape).index_copy(axis, torch.from_numpy(np.flatnonzero(kept)).to(x.device), x)
        return x

    def _mask(self, x: Tensor, value: Value) -> Tensor:
        for axis, labels in value.axes.items():
            kept = self._kept(labels, x.shape[axis])
            if not kept.all():
                shape = [1] * x.dim()
                shape[axis] = len(kept)
                x = torch.where(torch.from_numpy(kept).to(x.device).view(shape), x, torch.zeros((), dtype=x.dtype, device=x.device))
        return x


def run_masked(channels: ChannelGraph, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the original graph with a plan's removed channels masked, in eval mode."""
    graph = channels.graph
    training = graph.training
    graph.eval()
    try:
        with full_float32(), torch.no_grad():
            arguments = graph.graph.process_inputs(*inputs)
            interpreter = _Masked(channels, channels.kept_masks(plan), plan)
            return outputs_of(interpreter.run(*arguments, enable_io_processing=False))
    finally:
        graph.train(training)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest ||found - expected|| / ||expected|| over pairs of tensors; infinite where shapes differ or NaN appears."""
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        error = float((a - b).norm() / max(float(b.norm()), 1e-12))
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return worst


def verify_removal(
    channels: ChannelGraph, plan: Plan, removed: fx.GraphModule, inputs: Sequence[Tensor] | None = None
) -> Verification:
    """Check *removed = masked*.

    Args:
        channels: Analysis of the original graph.
        plan: The plan.
        removed: The graph that the plan was applied to, before any training.
        inputs: What to run on; where left out, random inputs of the traced shape, at the traced batch size and,
            where the batch is dynamic, at another one.

    Raises:
        PassError: The outputs differ by more than `TOLERANCE`.
    """
    error = 0.0
    for example in _examples(channels.graph) if inputs is None else [inputs]:
        example = [x.to(device_of(removed)) for x in example]
        masked = run_masked(channels, plan, example)
        training = removed.training
        removed.eval()
        with full_float32(), torch.no_grad():
            found = outputs_of(removed(*example))
        removed.train(training)
        error = max(error, relative_error(found, masked))
    narrowed = {name for name, kept in plan.kept for g in channels.groups if g.name == name and len(kept) < g.size}
    lossy = tuple(dict.fromkeys(op for g in channels.groups if g.name in narrowed for op in g.lossy))
    if error > TOLERANCE:
        raise PassError(
            f"removing channels changed the outputs by a relative {error:.2e} against masking them (allowed {TOLERANCE:.0e}); "
            "this is a defect of an op rule, please report the model"
        )
    logger.info("verify: removed = masked within %.1e", error)
    return Verification(error, lossy)


def _examples(graph: fx.GraphModule) -> list[Sequence[Tensor]]:
    return [example_inputs_of(graph, size) for size in ((2, 3) if graph.meta.get(DYNAMIC) else (None,))]
