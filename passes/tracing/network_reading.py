"""Read a network file; see `network_file.py` for what it holds. Everything is checked before fx sees it, and nothing is run."""

import json
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from compressor.errors import DataError
from compressor.passes.tracing.network_file import CONTAINERS, MODULES, SCHEMA, SPECIAL, STACK
from compressor.passes.tracing.network_ops import function_of
from compressor.passes.tracing.shapes import VALUE
from compressor.passes.tracing.trace import BATCH, DYNAMIC, INPUTS, UNUSED, CheckInputs
from compressor.values.json_text import parse_json

_TAKEN = {"self", "torch", "math", "operator", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"}  # in generated Python
_INPUT_TYPES = {"float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"}
_MOST_ELEMENTS = 1 << 31  # of an input
_NAME = re.compile(r"[A-Za-z0-9_.]+\Z")
_PATH = re.compile(r"[A-Za-z0-9_.:/+-]+\Z")  # of a module: generated Python quotes what is no identifier


def network_from(data: bytes) -> fx.GraphModule:
    """The traced graph of a file, in eval mode. Nothing of the file is run.

    Raises:
        DataError: It is cut off, damaged, of another version, or names what a network file may not hold.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = parse_json(header["__metadata__"]["network"])
        if description.get("schema") != SCHEMA:
            raise DataError(f"field `schema` is {description.get('schema')!r}, this version reads {SCHEMA}")
        return _assembled(description, tensors)
    except DataError:
        raise
    except safetensors.SafetensorError as error:
        raise DataError(f"not a network file, or cut off ({error})") from error
    except Exception as error:  # a description of another shape fails in as many ways as there are fields
        raise DataError(f"not a network file of this version ({type(error).__name__}: {str(error)[:200]})") from error


def _assembled(description: Mapping[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    for name, other in description["tied"].items():
        tensors[name] = tensors[other]
    root = nn.Module()
    owned: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        owned.setdefault(owner, {})[leaf] = tensor
    for name, about in description["modules"].items():
        _place(root, _checked(name, _PATH), _made(about, owned.get(name, {})))
    _fill(root, tensors, description["kinds"])
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for about in description["nodes"]:
        name, op = _checked(about["name"]), str(about["op"])
        if op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
            raise DataError(f"node `{name}` is a {op}, which no network file holds")
        target = function_of(about["target"]) if op == "call_function" else _checked(about["target"], _PATH)
        args, kwargs = _value(about["args"], known), _value(about["kwargs"], known)
        _check_node(op, name, target, args, kwargs, description)
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise DataError(f"node `{name}` appears twice, or is no name")
        node.meta[VALUE] = _value(about["value"], known)
        node.meta[STACK] = {str(key): (str(path), str(kind)) for key, path, kind in about["stack"]}
        known[name] = node
    names = [_checked(name) for name in description["arguments"]]
    order = [node.op for node in graph.nodes]
    inputs_found = [node.target for node in graph.nodes if node.op == "placeholder"]
    if order[-1:] != ["output"] or order.count("output") != 1 or inputs_found != names:
        raise DataError("the inputs of the graph are not its arguments, or it does not end with one output")
    inputs = pytree.tree_structure(((0,) * len(names), {}))
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, inputs, pytree.tree_structure(_template(description["output"]))))
    gm = fx.GraphModule(root, graph)
    for name in (name for name, kind in description["kinds"].items() if kind == "hidden"):
        path, _, leaf = name.rpartition(".")
        gm.get_submodule(path)._non_persistent_buffers_set.add(leaf)  # what fx copies, it makes persistent
    meta = description["meta"]
    shapes = tuple((_sizes(shape), _dtype_name(dtype)) for shape, dtype in meta["inputs"])
    batch, dynamic = meta["batch"], meta["dynamic"]
    if len(shapes) > len(names) or not shapes or type(batch) is not int or batch < 1 or type(dynamic) is not bool:
        raise DataError("field `meta` does not say what the inputs are")
    gm.meta = {INPUTS: shapes, BATCH: batch, DYNAMIC: dynamic, UNUSED: tuple(map(str, meta["unused"]))}
    gm.register_forward_pre_hook(CheckInputs(shapes, gm.meta[DYNAMIC]))
    graph.lint()
    return gm.eval()


def _check_node(op: str, name: str, target: Any, args: Any, kwargs: Any, description: Mapping[str, Any]) -> None:
    """Refuse what generated Python would take for something else: fx writes names as they are, and defaults as text."""
    if not name.isidentifier() or name == "self" or name.startswith("__"):
        raise DataError(f"{name!r} is no name of a node")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise DataError(f"node `{name}` has no arguments that can be read")
    plain = target.isidentifier() and target not in _TAKEN if op == "placeholder" else True
    if op == "placeholder" and (not plain or args or kwargs or target not in description["arguments"]):
        raise DataError(f"input `{name}` is no plain input")
    if op == "get_attr" and (target not in description["kinds"] or args or kwargs):
        raise DataError(f"node `{name}` reads `{target}`, which is no tensor of the file")
    if op == "call_module" and target not in description["modules"]:
        raise DataError(f"node `{name}` calls `{target}`, which is no module of the file")


def _sizes(shape: Any) -> tuple[int, ...]:
    """Sizes of an input."""
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > _MOST_ELEMENTS:
        raise DataError(f"{str(shape)[:80]} is no shape of an input")
    return tuple(shape)


def _checked(name: object, form: re.Pattern[str] = _NAME) -> str:
    """A name that may stand in generated Python."""
    if not isinstance(name, str) or not form.match(name) or any(keyword.iskeyword(part) for part in name.split(".")):
        raise DataError(f"{name!r} is no name that a network file may hold")
    return name


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = cast(nn.Module, root._modules[part])
    root.add_module(leaf, module)


def _made(about: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module:
    kind, attributes = MODULES[about["class"]]
    options = {key: _value(about[key], {}) for key in attributes}
    for key, value in options.items():
        if not _is_setting(value):
            raise DataError(f"{key} of a {about['class']} is {str(value)[:80]}")
    if "in_channels" in options or "in_features" in options:
        options["bias"] = "bias" in own
    if about["class"] != "Linear" and "p" not in options:
        options["dtype"] = next((tensor.dtype for tensor in own.values() if tensor.is_floating_point()), None)
    with torch.device("meta"):
        return kind(**options)


def _is_setting(value: Any) -> bool:
    """A number, numbers, a truth value, nothing, or a word for a padding."""
    if isinstance(value, tuple | list):
        return all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    return (
        value is None
        or value in ("same", "valid")
        or isinstance(value, bool | float)
        or (type(value) is int and 0 <= value < 1 << 31)
    )


def _fill(root: nn.Module, tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> None:
    """Put every tensor in its place, after comparing its shape with what its module expects."""
    parameters: dict[int, nn.Parameter] = {}
    for name, kind in kinds.items():
        tensor, (path, _, leaf) = tensors[name], _checked(name, _PATH).rpartition(".")
        owner = root
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = cast(nn.Module, owner._modules[part])
        expected = owner._parameters.pop(leaf, None) if leaf in owner._parameters else owner._buffers.pop(leaf, None)
        if isinstance(expected, Tensor) and expected.shape != tensor.shape:
            raise DataError(f"`{name}` has shape {tuple(tensor.shape)}, its module is made for {tuple(expected.shape)}")
        if kind == "parameter":
            own = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
            owner.register_parameter(leaf, own)
        else:
            owner.register_buffer(leaf, tensor, persistent=kind == "buffer")
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if tensor.is_meta:
            raise DataError(f"the file holds no `{name}`")


def _value(value: Any, known: Mapping[str, fx.Node]) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise DataError("a list stands where an argument is expected")
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return known[inner]
    if kind in ("tuple", "list"):
        items = [_value(item, known) for item in inner]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {_checked(_value(key, known)): _value(item, known) for key, item in inner}
    if kind == "slice":
        return slice(*(_value(item, known) for item in inner))
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
    if kind == "device":
        return torch.device("cpu")
    found = getattr(torch, _checked(inner))
    if not isinstance(found, SPECIAL[kind]):
        raise DataError(f"{inner!r} is no {kind}")
    return found


def _template(nesting: Any) -> Any:
    """Something that is nested as the outputs are; the inverse of `_nesting`."""
    if nesting == "*":
        return 0
    name, keys, children = nesting
    if name == "none":
        return None
    items = [_template(child) for child in children]
    if name in ("dict", "ordered"):
        return CONTAINERS[name](zip([key if isinstance(key, int) else str(key) for key in keys], items, strict=True))
    return CONTAINERS[name](items)


def _dtype_name(name: object) -> str:
    if name not in _INPUT_TYPES:
        raise DataError(f"{name!r} is no type of an input")
    return str(name)
