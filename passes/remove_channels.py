"""`RemoveChannels`: build the graph that a plan describes, and leave the old one alone.

Along every label that goes, parameters and buffers are narrowed, module attributes and constants of the
graph (sizes in view, split, slice, pad, …) are edited. Only what stays is copied.
"""

import logging
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from compressor.errors import PassError
from compressor.passes.base import PassResult
from compressor.passes.channels import ChannelGraph, analyze
from compressor.passes.labels import IntArray, Slot, Value
from compressor.passes.rules import EDITS, Change, key_of
from compressor.passes.trace import quiet_deepcopy
from compressor.plan import Plan

logger = logging.getLogger(__name__)


class RemoveChannels:
    """Remove what a plan does not keep.

    Args:
        plan: What stays.
        channels: The analysis of the graph it will be called on; made anew where it is left out.
    """

    def __init__(self, plan: Plan, channels: ChannelGraph | None = None) -> None:
        self._plan = plan
        self._channels = channels

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return the narrowed graph; `gm` is not changed.

        Raises:
            PlanError: The plan does not fit the graph.
            PassError: The analysis given was made of another graph.
        """
        channels = analyze(gm) if self._channels is None else self._channels
        if channels.graph is not gm:
            raise PassError("this analysis was made of another graph; analyze the one that is to be changed")
        masks = channels.kept_masks(self._plan)
        new = _copy_narrowed(gm, channels, masks)
        kept_of: Callable[[IntArray], NDArray[np.bool_]] = lambda labels: channels.kept_labels(labels, masks)  # noqa: E731
        for node in list(new.graph.nodes):
            if node.op == "call_module":
                fit(new.get_submodule(str(node.target)))
            _edit(new, node, channels, kept_of)
        new.graph.lint()
        new.recompile()
        modified = not all(mask.all() for mask in masks)
        logger.info("RemoveChannels: %d of %d channels stay", sum(int(m.sum()) for m in masks), sum(len(m) for m in masks))
        return PassResult(new, modified)


def _copy_narrowed(gm: fx.GraphModule, channels: ChannelGraph, masks: list[NDArray[np.bool_]]) -> fx.GraphModule:
    """A deep copy in which every tensor is the narrowed one from the start, so that nothing is copied twice."""
    memo: dict[int, object] = {}
    slots: dict[str, list[Slot]] = {}
    for slot in channels.walk.labeler.slots.values():
        slots.setdefault(slot.name, []).append(slot)
    with torch.no_grad():
        for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
            narrowed = tensor.detach()
            for slot in slots.get(name, []):
                kept = channels.kept_labels(slot.labels, masks)
                if not kept.all():
                    narrowed = _narrow(narrowed, slot, kept)
            narrowed = narrowed.clone() if narrowed.data_ptr() == tensor.data_ptr() else narrowed
            narrowed = narrowed.contiguous()
            memo[id(tensor)] = nn.Parameter(narrowed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else narrowed
    return quiet_deepcopy(gm, memo)


def _narrow(tensor: Tensor, slot: Slot, kept: NDArray[np.bool_]) -> Tensor:
    if slot.blocks == 1:
        return tensor.index_select(slot.axis, torch.from_numpy(np.flatnonzero(kept)).to(tensor.device))
    # Rows may have been narrowed already (equally per block), so blocks are counted on what is there.
    rows = tensor.reshape(slot.blocks, -1, *tensor.shape[1:])
    parts = []
    for block, mask in zip(rows, kept.reshape(slot.blocks, -1), strict=True):
        parts.append(block.index_select(slot.axis, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device)))
    return torch.cat(parts)


def _edit(gm: fx.GraphModule, node: fx.Node, channels: ChannelGraph, kept_of: Callable[[IntArray], NDArray[np.bool_]]) -> None:
    """Edit a node's constants where a size around it changed, and its recorded shapes."""
    outputs = channels.walk.values.get(node.name, ())
    call = channels.walk.calls.get(node.name)
    inputs = call.values if call is not None else []
    if all(kept_of(labels).all() for value in (*outputs, *inputs) for labels in value.axes.values()):
        return
    if call is not None:
        function = EDITS.get(key_of(node, call.module))
        if function is not None:
            add = _constant_adder(gm, node)
            function(Change(node, call, inputs[0] if inputs else outputs[0], outputs, kept_of, add))
    _update_shapes(node, outputs, kept_of)


def _constant_adder(gm: fx.GraphModule, node: fx.Node) -> Callable[[IntArray, str], fx.Node]:
    def add(values: IntArray, name: str) -> fx.Node:
        tensor = torch.from_numpy(values.astype(np.int64))
        readers = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
        if len(readers) == 1 and len(readers[0].users) == 1:
            path, _, leaf = name.rpartition(".")
            owner = gm.get_submodule(path)
            setattr(owner, leaf, tensor.to(getattr(owner, leaf).device))
            return cast(fx.Node, readers[0])
        gm.register_buffer(f"{node.name}_index", tensor)
        with gm.graph.inserting_before(node):
            new: fx.Node = gm.graph.get_attr(f"{node.name}_index")
            return new

    return add


def _update_shapes(node: fx.Node, outputs: tuple[Value, ...], kept_of: Callable[[IntArray], NDArray[np.bool_]]) -> None:
    recorded = node.meta.get("val")
    several = isinstance(recorded, list | tuple)
    tensors = list(recorded) if isinstance(recorded, list | tuple) else [recorded]
    for k, (tensor, value) in enumerate(zip(tensors, outputs, strict=False)):
        if isinstance(tensor, FakeTensor) and value.axes:
            size = list(tensor.shape)
            for axis, labels in value.axes.items():
                size[axis] = int(kept_of(labels).sum())
            with tensor.fake_mode:
                tensors[k] = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    if tensors and recorded is not None:
        node.meta["val"] = tensors if several else tensors[0]


def _fit_conv(module: nn.Module) -> None:
    conv = cast(nn.Conv2d, module)
    own = conv.weight.shape
    if conv.groups > 1 and conv.in_channels == conv.groups:  # depthwise: as many groups as inputs are left
        multiplier = conv.out_channels // conv.groups
        conv.groups = own[0] // multiplier
    conv.out_channels, conv.in_channels = own[0], own[1] * conv.groups


def _fit_transposed(module: nn.Module) -> None:
    conv = cast(nn.ConvTranspose2d, module)
    own = conv.weight.shape
    if conv.groups > 1 and conv.in_channels == conv.groups:
        conv.groups = own[0]
    conv.in_channels, conv.out_channels = own[0], own[1] * conv.groups


def _fit_linear(module: nn.Module) -> None:
    linear = cast(nn.Linear, module)
    linear.out_features, linear.in_features = linear.weight.shape


def _fit_features(module: nn.Module) -> None:
    norm = cast(nn.BatchNorm2d, module)
    tensor = next(t for t in (norm.weight, norm.running_mean) if t is not None)
    norm.num_features = tensor.shape[0]


def _fit_layer_norm(module: nn.Module) -> None:
    norm = cast(nn.LayerNorm, module)
    norm.normalized_shape = tuple(norm.weight.shape)


def _fit_group_norm(module: nn.Module) -> None:
    norm = cast(nn.GroupNorm, module)
    per_block = norm.num_channels // norm.num_groups
    norm.num_channels = norm.weight.shape[0]
    if norm.num_groups > 1:  # as if whole blocks had gone; an edit corrects it where they have shrunk
        norm.num_groups = max(norm.num_channels // per_block, 1)


_FIT: Mapping[type[nn.Module], Callable[[nn.Module], None]] = {
    nn.Conv1d: _fit_conv,
    nn.Conv2d: _fit_conv,
    nn.Conv3d: _fit_conv,
    nn.ConvTranspose1d: _fit_transposed,
    nn.ConvTranspose2d: _fit_transposed,
    nn.ConvTranspose3d: _fit_transposed,
    nn.Linear: _fit_linear,
    nn.BatchNorm1d: _fit_features,
    nn.BatchNorm2d: _fit_features,
    nn.BatchNorm3d: _fit_features,
    nn.InstanceNorm1d: _fit_features,
    nn.InstanceNorm2d: _fit_features,
    nn.InstanceNorm3d: _fit_features,
    nn.LayerNorm: _fit_layer_norm,
    nn.GroupNorm: _fit_group_norm,
}


def fit(module: nn.Module) -> None:
    """Make a module's attributes (`out_channels`, `num_features`, …) say what its tensors are."""
    for kind, function in _FIT.items():
        if isinstance(module, kind):
            function(module)
            return
