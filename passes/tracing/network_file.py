"""A traced network in one file that cannot hold code: the graph as JSON, the tensors beside it, as safetensors.

`torch.export.save` writes pickles, and reads them: such a file runs what its author put there. Here a node names an op of
PyTorch, a module of a fixed list, or arithmetic on sizes; everything else is refused, and names that would appear in generated
Python have to be plain identifiers. What is loaded is a traced graph again, which can be trained and compressed further.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from compressor.errors import PassError
from compressor.passes.tracing.network_ops import name_of
from compressor.passes.tracing.shapes import VALUE
from compressor.passes.tracing.trace import BATCH, DYNAMIC, INPUTS, UNUSED, on_cpu

SCHEMA = 1
STACK = "nn_module_stack"
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    **{kind.__name__: (kind, _CONV) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{kind.__name__: (kind, (*_CONV, "output_padding")) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)},
    **{kind.__name__: (kind, _NORM) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)},
    **{kind.__name__: (kind, _NORM) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)},
    **{kind.__name__: (kind, ("p",)) for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)},
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "GroupNorm": (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
}
"""What a `call_module` node may be: class -> the attributes that make it."""
SPECIAL = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "ordered": OrderedDict}


def network_bytes(gm: fx.GraphModule) -> bytes:
    """The file of a traced graph; see `network_from`.

    Raises:
        PassError: It holds something that the file has no word for; it is named.
    """
    gm = on_cpu(gm)
    tensors, tied = _tensors(gm)
    info = cast(_PyTreeCodeGen, gm.graph._codegen).pytree_info
    called = dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    description = {
        "schema": SCHEMA,
        "nodes": [_node(node) for node in gm.graph.nodes],
        "modules": {name: _module(name, gm.get_submodule(name)) for name in called},
        "kinds": _kinds(gm),
        "tied": tied,
        "arguments": list(info.orig_args),
        "output": _nesting(cast(pytree.TreeSpec, info.out_spec)),
        "meta": {
            "inputs": [[list(shape), dtype] for shape, dtype in gm.meta[INPUTS]],
            "batch": gm.meta[BATCH],
            "dynamic": gm.meta[DYNAMIC],
            "unused": list(gm.meta.get(UNUSED, ())),
        },
    }
    return save(tensors, {"network": json.dumps(description, ensure_ascii=False, allow_nan=False)})


def _tensors(gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and which other names stand for it."""
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    everything = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(everything, key=lambda item: item[0]):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            found[name] = tensor.detach().contiguous().clone()
    return found, tied


def _kinds(gm: fx.GraphModule) -> dict[str, str]:
    """Parameter, buffer, or a buffer that the state_dict leaves out."""
    kinds = {name: "parameter" for name, _ in gm.named_parameters(remove_duplicate=False)}
    stored = gm.state_dict().keys()
    for name, _ in gm.named_buffers(remove_duplicate=False):
        kinds[name] = "buffer" if name in stored else "hidden"
    return dict(sorted(kinds.items()))


def _module(name: str, module: nn.Module) -> dict[str, object]:
    kind = type(module).__name__
    if kind not in MODULES or type(module) is not MODULES[kind][0]:
        raise PassError(f"a network file holds no module of the class {kind} (`{name}`)")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise PassError(f"a network file holds no padding by {module.padding_mode!r} (`{name}`)")
    return {"class": kind, **{key: _plain(getattr(module, key)) for key in MODULES[kind][1]}}


def _node(node: fx.Node) -> dict[str, object]:
    target = name_of(node.target) if node.op == "call_function" else str(node.target)
    stack = [[key, *map(str, value)] for key, value in (node.meta.get(STACK) or {}).items()]
    return {
        "op": node.op, "name": node.name, "target": target, "args": _plain(node.args), "kwargs": _plain(dict(node.kwargs)),
        "value": _plain(node.meta.get(VALUE)), "stack": stack,
    }  # fmt: skip


def _plain(value: Any) -> object:
    """An argument as JSON: what is no number, text or truth value becomes an object with one key."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_plain(value.start), _plain(value.stop), _plain(value.step)]}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    for name, kind in SPECIAL.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise PassError(f"a network file has no word for an argument of the type {type(value).__name__}")


def _nesting(spec: pytree.TreeSpec) -> object:
    """How outputs are nested; containers of other classes become tuples."""
    if spec.is_leaf():
        return "*"
    children = [_nesting(child) for child in spec.children()]
    name = next((name for name, kind in CONTAINERS.items() if spec.type is kind), "none" if spec.type is type(None) else "tuple")
    return [name, list(spec.context) if name in ("dict", "ordered") else None, children]
