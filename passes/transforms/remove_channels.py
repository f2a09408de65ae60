"""`RemoveChannels`: build the graph that a plan describes, without its channels and branches, and leave the old one alone.

Along every label that goes, parameters and buffers are narrowed, module attributes and constants of the
graph (sizes in view, split, slice, pad, …) are edited. Only what stays is copied, and only once: a search
applies plans by the hundred.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.errors import PassError
from compressor.passes.channels.analyze import ChannelGraph, analysis_of
from compressor.passes.channels.readers import inputs_read, kept_channels, readers_of
from compressor.passes.labels.labeler import IntArray, Slot
from compressor.passes.labels.rules import EDITS, Change, key_of
from compressor.passes.tracing.shapes import VALUE
from compressor.passes.tracing.trace import device_of
from compressor.passes.transforms.base import PassResult
from compressor.passes.transforms.gather_inputs import gather_inputs
from compressor.passes.transforms.remove_branches import branches_named, remove_branches
from compressor.passes.transforms.update_attributes import fit
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)

_Kept = Callable[[IntArray], NDArray[np.bool_]]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class RemoveChannels:
    """Remove what a plan does not keep.

    Args:
        plan: What stays.
        channels: The analysis of the graph it will be called on; the one at hand, or a new one, where it is left out.
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
        channels = analysis_of(gm) if self._channels is None else self._channels
        if channels.graph is not gm:
            raise PassError("this analysis was made of another graph; analyze the one that is to be changed")
        masks = channels.kept_masks(self._plan)
        kept_of = channels.keeper(masks)
        graph = _copy_graph(gm.graph)
        new = _assemble(gm, graph, _narrowed(gm, channels, kept_of))
        for node in list(graph.nodes):
            _edit(new, node, channels, kept_of)
        remove_branches(new, branches_named(channels.branches, self._plan.removed))
        self._gather(new, channels, masks)
        modified = not all(mask.all() for mask in masks) or bool(self._plan.reads) or bool(self._plan.removed)
        logger.info("RemoveChannels: %d of %d channels stay", sum(int(m.sum()) for m in masks), sum(len(m) for m in masks))
        return PassResult(new, modified)

    def _gather(self, new: fx.GraphModule, channels: ChannelGraph, masks: list[NDArray[np.bool_]]) -> None:
        """Let layers read a part of what stays, where the plan says so."""
        readers = readers_of(channels) if self._plan.reads else {}
        chosen = {}
        for node, reads in inputs_read(channels, self._plan, masks).items():
            stays = kept_channels(readers[node].inputs, masks, channels, len(reads))
            if not reads[stays].all():
                chosen[node] = np.flatnonzero(reads[stays])
        if chosen:
            gather_inputs(new, chosen)


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        known[node] = new.node_copy(node, known.__getitem__)
    new.set_codegen(copy.copy(graph._codegen))
    return new


def _narrowed(gm: fx.GraphModule, channels: ChannelGraph, kept_of: _Kept) -> dict[int, Tensor]:
    """By the `id` of each parameter and buffer: what stays of it."""
    slots: dict[str, list[Slot]] = {}
    for slot in channels.walk.labeler.slots.values():
        slots.setdefault(slot.name, []).append(slot)
    result: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
            narrowed = tensor.detach()
            for slot in slots.get(name, ()):
                kept = kept_of(slot.labels)
                if not kept.all():
                    narrowed = _narrow(narrowed, slot, kept)
            narrowed = narrowed.clone() if narrowed.data_ptr() == tensor.data_ptr() else narrowed.contiguous()
            result[id(tensor)] = nn.Parameter(narrowed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else narrowed
    return result


def _narrow(tensor: Tensor, slot: Slot, kept: NDArray[np.bool_]) -> Tensor:
    if slot.blocks == 1:
        return tensor.index_select(slot.axis, torch.from_numpy(kept.nonzero()[0]).to(tensor.device))
    # Rows may have been narrowed already (equally per block), so blocks are counted on what is there.
    rows = tensor.reshape(slot.blocks, -1, *tensor.shape[1:])
    parts = []
    for block, mask in zip(rows, kept.reshape(slot.blocks, -1), strict=True):
        parts.append(block.index_select(slot.axis, torch.from_numpy(mask.nonzero()[0]).to(tensor.device)))
    return torch.cat(parts)


def _assemble(gm: fx.GraphModule, graph: fx.Graph, tensors: Mapping[int, Tensor]) -> fx.GraphModule:
    """A graph module around `graph` whose modules are those of `gm` with the given tensors in place of theirs."""
    root = nn.Module()
    twins: dict[nn.Module, nn.Module] = {gm: root}
    for path, module in gm.named_modules(remove_duplicate=False):
        if path:
            twins.setdefault(module, _twin(module))
            owner, _, leaf = path.rpartition(".")
            twins[gm.get_submodule(owner)]._modules[leaf] = twins[module]
    for module, twin in twins.items():
        twin._parameters = {k: None if t is None else cast(nn.Parameter, tensors[id(t)]) for k, t in module._parameters.items()}
        twin._buffers = {k: None if t is None else tensors[id(t)] for k, t in module._buffers.items()}
        fit(twin)
    new = fx.GraphModule({}, fx.Graph(), class_name=type(gm).__name__)
    new._modules, new._parameters, new._buffers = root._modules, root._parameters, root._buffers
    new._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    new._graph = graph
    graph.owning_module = new
    new.training = gm.training
    new.meta = dict(gm.meta)
    for name in _HOOKS:
        setattr(new, name, copy.copy(getattr(gm, name)))
    return new


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class with the same attributes and hooks, and no tensors or submodules yet."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = {name: value.copy() if isinstance(value, dict | set) else value for name, value in vars(module).items()}
    twin._modules = {}
    return twin


def _edit(gm: fx.GraphModule, node: fx.Node, channels: ChannelGraph, kept_of: _Kept) -> None:
    """Edit a node's constants where a size around it changed, and its recorded shapes."""
    outputs = channels.walk.values.get(node.name, ())
    call = channels.walk.calls.get(node.name)
    function = EDITS.get(key_of(node, call.module)) if call is not None else None
    inputs = call.values if call is not None and function is not None else []
    if all(kept_of(labels).all() for value in (*outputs, *inputs) for labels in value.axes.values()):
        return
    if call is not None and function is not None:
        add = _constant_adder(gm, node)
        function(Change(node, call, inputs[0] if inputs else outputs[0], outputs, kept_of, add))
    shapes = [
        tuple(int(kept_of(value.axes[axis]).sum()) if axis in value.axes else size for axis, size in enumerate(value.shape))
        for value in outputs
    ]
    node.meta[VALUE] = shapes if isinstance(node.meta.get(VALUE), list) else shapes[0]


def _constant_adder(gm: fx.GraphModule, node: fx.Node) -> Callable[[IntArray, str], fx.Node]:
    def add(values: IntArray, name: str) -> fx.Node:
        tensor = torch.from_numpy(values.astype(np.int64))
        readers = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
        if len(readers) == 1 and len(readers[0].users) == 1:
            path, _, leaf = name.rpartition(".")
            owner = gm.get_submodule(path)
            setattr(owner, leaf, tensor.to(getattr(owner, leaf).device))
            return cast(fx.Node, readers[0])
        gm.register_buffer(f"{node.name}_index", tensor.to(device_of(gm)))
        with gm.graph.inserting_before(node):
            new: fx.Node = gm.graph.get_attr(f"{node.name}_index")
            return new

    return add
