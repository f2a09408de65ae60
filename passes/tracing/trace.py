"""`trace`: any model in, one graph language out.

`torch.export` with a dynamic batch dimension gives ATen ops; `Remodulise` turns what owns parameters
into modules again. What comes out is an ordinary trainable `fx.GraphModule` whose nodes carry their
shapes in `node.meta` (see `shapes.py`) and whose `state_dict` has the original keys. Parameters that the forward
pass never reads (auxiliary heads in eval mode) are left behind.
"""

import contextlib
import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from compressor.errors import TraceError
from compressor.passes.tracing.call_arguments import writers_of
from compressor.passes.tracing.constants import fold_literals
from compressor.passes.tracing.modes import untouched
from compressor.passes.tracing.remodulise import Remodulise
from compressor.passes.tracing.reparametrized import reparametrized, with_plain_weights
from compressor.passes.tracing.shapes import record_shapes

logger = logging.getLogger(__name__)

# Keys of `GraphModule.meta`. Only keys that start so belong to us; fx keeps the others.
INPUTS = "compressor.inputs"  # example shapes and dtypes, one per tensor input
BATCH = "compressor.batch"  # the batch size that stands in the recorded shapes
DYNAMIC = "compressor.dynamic_batch"  # whether other batch sizes are allowed
UNUSED = "compressor.unused"  # names of parameters that the forward pass never reads

_T = TypeVar("_T")
_ASSERTION = torch.ops.aten._assert_tensor_metadata  # what `.to(dtype)` leaves behind; it computes nothing
_TRACE_BATCH = 2  # export specialises sizes 0 and 1, so the graph is traced at 2


def trace(model: nn.Module, example_inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Trace `model` into a graph of ATen ops and modules.

    Args:
        model: Any model that `torch.export` takes. It is left as it was, train and eval modes included.
        example_inputs: The positional inputs; axis 0 of each is the batch, of any size from 1.

    Returns:
        A graph module in the same train or eval mode as `model`, sharing no tensor with it. It takes
        any batch size where the model allows that (`meta["compressor.dynamic_batch"]`) and refuses other
        spatial sizes than the traced one, and is where the model is; a model on a GPU is traced as a copy on the CPU.
        Weights that the model computes from others (weight norm, spectral norm) are plain weights in it.

    Raises:
        TraceError: The model is no module, the inputs do not fit it, or export fails; the message
            names the line of the model where it did.
    """
    _check_arguments(model, example_inputs)
    if computed := reparametrized(model):
        logger.info(
            "trace: %d weights are computed at every call, and are taken for what they come to: %s", len(computed), computed[0]
        )
        model = with_plain_weights(model)
    device = device_of(model)
    if device.type == "cuda":  # there the exporter takes the batch size for a constant (cuDNN chooses by it)
        copied = on_cpu(model) if isinstance(model, fx.GraphModule) else quiet_deepcopy(model).to("cpu")
        return moved(trace(copied, [x.cpu() for x in example_inputs]), device)
    inputs = tuple(x.detach().clone() for x in example_inputs)  # the model may change its inputs in place
    with untouched(model), torch.no_grad():
        _check_forward(model, inputs)
        program, dynamic = _export(model, inputs)
    source = program.module(check_guards=False)
    graph = quiet_deepcopy(source.graph)
    for node in list(graph.nodes):
        if node.target == "_guards_fn" or getattr(node.target, "overloadpacket", None) is _ASSERTION:
            graph.erase_node(node)
    _copy_inputs_written_to(graph)
    root = Remodulise(source, model).run(graph)
    record_shapes(graph)
    fold_literals(graph, root, {*dict(model.named_parameters()), *dict(model.named_buffers())})
    owned = quiet_deepcopy(root)  # after this the graph shares nothing with the user's model
    gm = fx.GraphModule(owned, graph, class_name=type(model).__name__)
    gm.meta[INPUTS] = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs)
    gm.meta[DYNAMIC] = dynamic
    gm.meta[BATCH] = _TRACE_BATCH if dynamic else inputs[0].shape[0] if inputs[0].dim() else 1
    kept = set(dict(gm.named_parameters(remove_duplicate=False)))
    unused = sorted(set(dict(model.named_parameters(remove_duplicate=False))) - kept)
    gm.meta[UNUSED] = tuple(unused)
    if unused:
        logger.info("trace: %d parameters are never read in eval mode and are left out, e.g. %s", len(unused), unused[0])
    gm.register_forward_pre_hook(CheckInputs(gm.meta[INPUTS], dynamic))
    gm.graph.lint()
    gm.recompile()
    _take_over_modes(gm, model)
    return gm


def _copy_inputs_written_to(graph: fx.Graph) -> None:
    """An input that the model changes in place (`x *= 255`) is copied first: who calls the graph again has it as it was."""
    for placeholder in [node for node in graph.nodes if node.op == "placeholder"]:
        if any(True for _ in writers_of({placeholder})):
            with graph.inserting_after(placeholder):
                copied = graph.call_function(torch.ops.aten.clone.default, (placeholder,))
            copied.meta = dict(placeholder.meta)
            placeholder.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)


def _take_over_modes(gm: fx.GraphModule, model: nn.Module) -> None:
    """Train or eval as in the model, module by module; buffers that its state_dict leaves out stay left out."""
    gm.train(model.training)
    modules = dict(model.named_modules())
    keys = model.state_dict().keys()
    for path, module in gm.named_modules():
        if path in modules:
            module.training = modules[path].training
        for leaf in module._buffers:
            if f"{path}.{leaf}".lstrip(".") not in keys:
                module._non_persistent_buffers_set.add(leaf)


def quiet_deepcopy(value: _T, memo: dict[int, object] | None = None) -> _T:
    """`copy.deepcopy` of something that holds an fx graph: copying its pytree specs warns about torch's own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(value, memo)


def moved(graph: fx.GraphModule, device: torch.device, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Move a graph: parameters, buffers, and the devices that its nodes name; with a `dtype`, what is float32 becomes that."""

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else (dtype or value) if value is torch.float32 else value

    graph.to(device=device, dtype=dtype)
    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), there)
    graph.recompile()
    return graph


def on_cpu(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph itself, or a copy on the CPU of one that is elsewhere: what is exported does not depend on where it was made."""
    found = {tensor.device.type for tensor in (*graph.parameters(), *graph.buffers())}
    for node in graph.graph.nodes:
        map_aggregate((node.args, node.kwargs), lambda value: found.add(value.type) if isinstance(value, torch.device) else None)
    return moved(quiet_deepcopy(graph), torch.device("cpu")) if found - {"cpu"} else graph


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are, or its buffers where it has none; a module without tensors is on the CPU."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


class CheckInputs:
    """Refuses inputs whose shape is not the traced one (the batch aside, where it is dynamic).

    Constants that the model computed from the spatial size are baked into the graph, so another size
    could be silently wrong.
    """

    def __init__(self, expected: Sequence[tuple[tuple[int, ...], str]], dynamic: bool) -> None:
        self._expected = tuple(shape for shape, _ in expected)
        self._first = 1 if dynamic else 0

    def __call__(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        """A forward pre-hook."""
        del module
        for k, (value, shape) in enumerate(zip(inputs, self._expected, strict=False)):
            if isinstance(value, Tensor) and tuple(value.shape)[self._first :] != shape[self._first :]:
                raise TraceError(
                    f"input {k} has shape {tuple(value.shape)}, the graph was traced for "
                    f"{tuple('any' if a < self._first else s for a, s in enumerate(shape))}; trace the model again for this shape"
                )


def example_inputs_of(gm: fx.GraphModule, batch: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the traced shapes (floats normal, integers 0 or 1), reproducible by the seed."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for shape, name in gm.meta[INPUTS]:
        size = (batch, *shape[1:]) if batch is not None and shape else shape
        dtype = getattr(torch, name)
        if dtype.is_floating_point or dtype.is_complex:
            result.append(torch.randn(size, generator=generator).to(dtype))
        else:
            result.append(torch.randint(0, 2, size, generator=generator).to(dtype))
    return tuple(result)


def is_traced(module: nn.Module) -> bool:
    """Whether `module` came from `trace` (or from a pass over such a graph)."""
    return isinstance(module, fx.GraphModule) and INPUTS in module.meta


def outputs_of(value: object) -> list[Tensor]:
    """The tensors of a model's output, whatever it is nested in, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _check_arguments(model: object, example_inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model must be a torch.nn.Module, found {type(model).__name__}")
    lazy = next((name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta), None)
    if lazy is not None:
        raise TraceError(f"`{lazy}` is on the device `meta`, which holds no values: load the model's weights first")
    _check_kind(model)
    if isinstance(example_inputs, Tensor):
        raise TraceError("example_inputs must be a tuple of tensors, found one tensor; write (x,) for a single input")
    if isinstance(example_inputs, Mapping) or not isinstance(example_inputs, Sequence) or not example_inputs:
        raise TraceError(f"example_inputs must be a non-empty tuple of tensors, found {type(example_inputs).__name__}")
    for k, x in enumerate(example_inputs):
        if not isinstance(x, Tensor):
            raise TraceError(f"example_inputs[{k}] must be a tensor, found {type(x).__name__}")


def _check_kind(model: nn.Module) -> None:
    """Refuse what is no longer a module of Python and floats."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("this is a TorchScript module, which cannot be traced again: pass the torch.nn.Module that it was made of")
    if "eval" in vars(model):  # what torch.export gives back cannot change its mode
        raise TraceError("this is the module of an exported program: pass the torch.nn.Module that it was made of")
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            raise TraceError(
                f"`{name}` is quantized already ({type(module).__name__}): pass the float model, and ask for integers by "
                'Target(precision="int8")'
            )


def _check_forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        model(*(x.clone() for x in inputs))
        if inputs[0].dim() and inputs[0].shape[0] == _TRACE_BATCH:
            with contextlib.suppress(Exception):  # a model that remembers its last shape (YOLO's anchors) is not to find that one
                model(*(x[:1].clone() for x in inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise TraceError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {_first_line(error)}; "
            "check the input shape (channels, height, width)"
        ) from error


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, bool]:
    """Export with a dynamic batch; where the model does not allow that, with the batch as it is."""
    batched = all(x.dim() > 0 and x.shape[0] == inputs[0].shape[0] for x in inputs)
    if batched:
        repeats = -(-_TRACE_BATCH // max(inputs[0].shape[0], 1))
        twice = tuple(torch.cat([x] * repeats)[:_TRACE_BATCH] for x in inputs)
        batch = torch.export.Dim("batch", min=1, max=1 << 20)
        by_name = {name: {0: batch} for name in _argument_names(model, len(twice))}
        shapes = by_name or (tuple({0: batch} for _ in twice),)  # a forward with *args takes them as one tuple
        try:
            return _export_quietly(model, twice, shapes), True
        except Exception as error:
            logger.warning(
                "trace: the batch size cannot be dynamic, it is fixed at %d (%s)", inputs[0].shape[0], _first_line(error)
            )
    try:
        return _export_quietly(model, inputs, None), False
    except Exception as error:
        decides = "data-dependent" in str(error).lower() or "unbacked" in str(error).lower()
        why = "Decisions by the values of tensors cannot be traced: hand" if decides else "Hand"
        raise TraceError(
            f"{type(model).__name__} cannot be exported{_model_line(error)}: {_first_line(error)}. "
            f"{why} over the part that can be traced{_largest_part(model)}, or rewrite that line"
        ) from error


def _largest_part(model: nn.Module) -> str:
    """` (the backbone, say: trace(model.features, ...))`: the child that holds most parameters."""
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    return f" (the backbone, say: `trace(model.{largest}, ...)`)" if largest else " (a backbone)"


def _export_quietly(model: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    logs = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logs.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logs.setLevel(logging.CRITICAL)  # where it fails, it prints whole graphs; what matters is in the exception
        try:
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        finally:
            logs.setLevel(level)


def _argument_names(model: nn.Module, count: int) -> list[str]:
    """Names of the positional parameters of `forward` (that of a decorated one), or nothing where it takes `*args`."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    names = [own.name for own in parameters if own.kind in (own.POSITIONAL_ONLY, own.POSITIONAL_OR_KEYWORD)]
    return names[:count] if len(names) >= count else []


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _model_line(error: BaseException) -> str:
    """` at file.py:12 (code)` of the innermost frame outside torch, where it can be told."""
    frames = []
    trace_back = error.__traceback__
    while trace_back is not None:
        frames.append((trace_back.tb_frame.f_code.co_filename, trace_back.tb_lineno))
        trace_back = trace_back.tb_next
    stated = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    frames += [(file, int(line)) for file, line in stated]
    own = [(f, n) for f, n in frames if "/torch/" not in f and not f.endswith("passes/tracing/trace.py") and not f.startswith("<")]
    return f" at {own[-1][0]}:{own[-1][1]}" if own else ""
