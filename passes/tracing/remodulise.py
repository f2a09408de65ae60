"""Turn functional convs, linears, norms and dropouts back into modules under their original names.

`torch.export` lowers every layer to a function of parameters. Here each function whose parameters are
exactly `<path>.weight`, `<path>.bias`, … becomes a `call_module` node named `<path>` again, so that the
keys of `state_dict` survive, BatchNorm and Dropout know train from eval, and passes meet one vocabulary.
A function over *computed* weights (weight standardisation, re-parameterisation) stays a function.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from compressor.passes.tracing.call_arguments import arguments_of

logger = logging.getLogger(__name__)
aten = torch.ops.aten

Arguments: TypeAlias = dict[str, object]
Stack: TypeAlias = dict[str, tuple[str, object]]


class Remodulise:
    """Collects the modules and tensors that a re-modulised graph refers to.

    Args:
        source: The exported module: owner of the parameters and buffers.
        original: The user's model, asked only for what the graph does not record (BatchNorm momentum).
    """

    def __init__(self, source: fx.GraphModule, original: nn.Module) -> None:
        self._source = source
        self._original = original
        self._made: dict[str, tuple[object, nn.Module]] = {}

    def run(self, graph: fx.Graph) -> dict[str, object]:
        """Rewrite `graph` in place; returns what its targets refer to, by qualified name."""
        for node in list(graph.nodes):
            builder = BUILDERS.get(node.target) if node.op == "call_function" else None
            if builder is not None:
                self._replace(graph, node, builder)
        for node in reversed(list(graph.nodes)):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        root: dict[str, object] = {path: module for path, (_, module) in self._made.items()}
        for node in graph.nodes:
            if node.op == "get_attr":
                root[str(node.target)] = _attribute(self._source, str(node.target))
        return root

    def _replace(self, graph: fx.Graph, node: fx.Node, builder: "Builder") -> None:
        arguments = arguments_of(node)
        tensors = {name: arguments.get(name) for name in builder.parameters}
        owned = {name: value for name, value in tensors.items() if value is not None}
        path = self._dropout_path(node) if not builder.parameters else _owner(owned)
        if path is None:
            return
        hyper = {key: value for key, value in arguments.items() if key not in tensors and key != "input"}
        if "running_mean" in owned and (hyper.get("training") or hyper.get("use_input_stats")):
            return  # statistics of the batch even in eval mode: no module does that
        if any(isinstance(value, fx.Node) for value in hyper.values()):
            return  # a stride computed at run time: no module can hold it
        values = {name: _attribute(self._source, str(cast(fx.Node, value).target)) for name, value in owned.items()}
        signature = (node.target, repr(hyper), tuple(sorted(owned)))
        if path in self._made:
            if self._made[path][0] != signature:
                return  # the same weights under another stride: the second use stays a function
            module = self._made[path][1]
        else:
            module = self._build(path, builder, hyper, values, arguments)
            self._made[path] = (signature, module)
        with graph.inserting_before(node):
            new = graph.call_module(path, (cast(fx.Node, arguments["input"]),))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def _build(self, path: str, builder: "Builder", hyper: Arguments, values: dict[str, Tensor], arguments: Arguments) -> nn.Module:
        module = builder.build(hyper, values, cast(fx.Node, arguments["input"]))
        for name, value in values.items():
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module._parameters.pop(name, None)  # a weight that is a buffer (frozen norms)
                module.register_buffer(name, value)
        try:
            original = self._original.get_submodule(path)
        except AttributeError:
            return module
        if isinstance(module, nn.modules.batchnorm._NormBase):
            momentum = getattr(original, "momentum", module.momentum)
            module.momentum = momentum if momentum is None else float(momentum)
            tracked = getattr(original, "num_batches_tracked", None)
            if isinstance(tracked, Tensor) and module.num_batches_tracked is not None:
                module.num_batches_tracked = tracked.clone()
        return module

    def _dropout_path(self, node: fx.Node) -> str | None:
        stack = cast(Stack, node.meta.get("nn_module_stack") or {})
        path, kind = list(stack.values())[-1] if stack else ("", "")
        path = path.split("@")[0]
        if not path or "dropout" not in str(kind).lower():
            path = f"{path}.dropout" if path else "dropout"
        base, k = path, 1
        while path in self._made or hasattr(self._source, path):  # functional dropouts of one module need a name each
            k += 1
            path = f"{base}_{k}"
        return path


class Build(Protocol):
    """Makes an empty module from a function's arguments."""

    def __call__(self, hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
        """`hyper` holds the plain arguments, `values` the tensors by role, `source` the input node."""


class Builder:
    """How one ATen op becomes a module: which arguments are parameters, and the constructor."""

    def __init__(self, parameters: Sequence[str], build: Build) -> None:
        self.parameters = tuple(parameters)
        self.build = build


def _owner(owned: Arguments) -> str | None:
    """The module path that owns exactly these parameters, or None."""
    paths = set()
    for role, value in owned.items():
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, leaf = str(value.target).rpartition(".")
        if leaf != role:
            return None
        paths.add(path)
    return paths.pop() or None if len(paths) == 1 else None


def _attribute(root: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(root.get_submodule(path), leaf))


def _tuple(value: object, dims: int) -> tuple[int, ...]:
    items = tuple(cast(Sequence[int], value)) if isinstance(value, Sequence) else (cast(int, value),)
    return items * dims if len(items) == 1 else items


def _convolution(kind: Callable[..., nn.Module], dims: int, transposed: bool) -> Build:
    def build(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
        del source
        shape, groups = values["weight"].shape, cast(int, hyper["groups"])
        first, second = shape[0], shape[1] * groups
        inputs, outputs = (first, second) if transposed else (second, first)
        padding = hyper["padding"]
        options: dict[str, object] = {
            "stride": _tuple(hyper["stride"], dims),
            "padding": padding if isinstance(padding, str) else _tuple(padding, dims),
            "dilation": _tuple(hyper["dilation"], dims),
            "groups": groups,
            "bias": "bias" in values,
            "device": "meta",
        }
        if transposed:
            options["output_padding"] = _tuple(hyper["output_padding"], dims)
        return kind(inputs, outputs, tuple(shape[2:]), **options)

    return build


def _linear(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
    del hyper, source
    outputs, inputs = values["weight"].shape
    return nn.Linear(inputs, outputs, bias="bias" in values, device="meta")


def _batch_norm(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
    rank = cast(Tensor, source.meta["val"]).dim()
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
    return _tracked_norm(kind, hyper, values)


def _instance_norm(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
    rank = cast(Tensor, source.meta["val"]).dim()
    kind = {4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(rank, nn.InstanceNorm1d)
    return _tracked_norm(kind, hyper, values)


def _tracked_norm(kind: Callable[..., nn.Module], hyper: Arguments, values: dict[str, Tensor]) -> nn.Module:
    return kind(
        next(iter(values.values())).shape[0],
        eps=hyper["eps"],
        momentum=hyper["momentum"],
        affine="weight" in values,
        track_running_stats="running_mean" in values,
    )


def _layer_norm(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
    del source
    shape = [int(size) for size in cast(Sequence[int], hyper["normalized_shape"])]
    return nn.LayerNorm(shape, eps=cast(float, hyper["eps"]), bias="bias" in values)


def _group_norm(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
    del source
    return nn.GroupNorm(cast(int, hyper["num_groups"]), values["weight"].shape[0], eps=cast(float, hyper["eps"]))


def _dropout(kind: Callable[..., nn.Module]) -> Build:
    def build(hyper: Arguments, values: dict[str, Tensor], source: fx.Node) -> nn.Module:
        del values, source
        return kind(hyper["p"])

    return build


_WEIGHTS = ("weight", "bias")
_TRACKED = ("weight", "bias", "running_mean", "running_var")

BUILDERS: dict[object, Builder] = {
    aten.conv1d.default: Builder(_WEIGHTS, _convolution(nn.Conv1d, 1, transposed=False)),
    aten.conv2d.default: Builder(_WEIGHTS, _convolution(nn.Conv2d, 2, transposed=False)),
    aten.conv3d.default: Builder(_WEIGHTS, _convolution(nn.Conv3d, 3, transposed=False)),
    aten.conv1d.padding: Builder(_WEIGHTS, _convolution(nn.Conv1d, 1, transposed=False)),
    aten.conv2d.padding: Builder(_WEIGHTS, _convolution(nn.Conv2d, 2, transposed=False)),
    aten.conv3d.padding: Builder(_WEIGHTS, _convolution(nn.Conv3d, 3, transposed=False)),
    aten.conv_transpose1d.default: Builder(_WEIGHTS, _convolution(nn.ConvTranspose1d, 1, transposed=True)),
    aten.conv_transpose2d.input: Builder(_WEIGHTS, _convolution(nn.ConvTranspose2d, 2, transposed=True)),
    aten.conv_transpose3d.input: Builder(_WEIGHTS, _convolution(nn.ConvTranspose3d, 3, transposed=True)),
    aten.linear.default: Builder(_WEIGHTS, _linear),
    aten.batch_norm.default: Builder(_TRACKED, _batch_norm),
    aten.instance_norm.default: Builder(_TRACKED, _instance_norm),
    aten.layer_norm.default: Builder(_WEIGHTS, _layer_norm),
    aten.group_norm.default: Builder(_WEIGHTS, _group_norm),
    aten.dropout.default: Builder((), _dropout(nn.Dropout)),
    aten.dropout_.default: Builder((), _dropout(nn.Dropout)),
    aten.feature_dropout.default: Builder((), _dropout(nn.Dropout2d)),
    aten.feature_dropout_.default: Builder((), _dropout(nn.Dropout2d)),
    aten.alpha_dropout.default: Builder((), _dropout(nn.AlphaDropout)),
    aten.alpha_dropout_.default: Builder((), _dropout(nn.AlphaDropout)),
}
