"""`Lowering`: ONNX for many networks that differ in widths alone, at the price of one or two exports.

`torch.onnx.export` takes 5 to 10 s, and a search builds hundreds of candidates that are one network with
other widths. Their ONNX graphs have the same nodes; what differs are the weights, which carry the names of the
`state_dict`, and a few numbers: groups of depthwise convolutions, amounts of padding, sizes in reshapes and slices.

So the first two networks are exported, and the numbers in which these two differ are traced back to the numbers
of the fx graph (arguments, module attributes, parameter shapes) that have the same two values. From then on the ONNX
of a network is written down directly: 0.03 to 0.17 s for ResNet-56, MobileNetV2 and ResNet-50
(`python tools/bench_lowering.py`). Where a number has no such origin, or the nodes differ, or the
result's shapes do not fit together, the network is exported as usual. `measuring/measure.py` compares every engine with
PyTorch before it is timed, so a wrong guess costs an export, never a wrong measurement.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx

from compressor.passes.tracing.trace import on_cpu
from compressor.passes.transforms.fold_batchnorm import folded_state
from compressor.runtime.onnx.export import to_onnx, with_final_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Example:
    """A network, its export, and the numbers that the export may have come from."""

    model: onnx.ModelProto
    numbers: dict[str, int]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _Slot:
    """A number in the ONNX graph that follows a number of the fx graph: `sign * numbers[source]`."""

    kind: str  # "initializer" or "attribute"
    index: int
    attribute: str
    element: int
    source: str
    sign: int


@dataclass(frozen=True)
class _Template:
    skeleton: onnx.ModelProto  # without initializers
    constants: tuple[onnx.TensorProto, ...]
    weights: tuple[str, ...]
    unsqueezed: tuple[tuple[str, str, tuple[int, ...]], ...]  # initializer, the weight (n,) that it is, and in what shape
    slots: tuple[_Slot, ...]


class _UnknownOriginError(Exception):
    """Where a difference between exports comes from is not understood."""


class Lowering:
    """Lowers networks of one topology; see the module. Not shared between threads.

    Attributes:
        exports: How many networks went through the exporter.
        written: How many were written down from the template.
    """

    def __init__(self) -> None:
        self._examples: list[_Example] = []
        self._template: _Template | None = None
        self.exports = 0
        self.written = 0

    def __call__(self, graph: fx.GraphModule, example: Sequence[Tensor], fresh: bool = False) -> onnx.ModelProto:
        """Lower a graph.

        Args:
            graph: A traced graph.
            example: Inputs of any batch size.
            fresh: Export it whatever is known, and learn from it: for after a comparison failed.

        Raises:
            BackendError: The exporter refuses the graph.
        """
        graph = on_cpu(graph)
        source = with_final_weights(graph)
        numbers, weights = dict(_numbers(source)), folded_state(source)
        if self._template is not None and not fresh:
            model = _written(self._template, numbers, weights)
            if model is not None:
                self.written += 1
                return model
        model = to_onnx(graph, example)
        self.exports += 1
        new = _Example(model, numbers, weights)
        self._examples = [*[e for e in self._examples if _comparable(e, new)][-3:], new]
        try:
            self._template = _learn(self._examples) if len(self._examples) > 1 else None
        except _UnknownOriginError as error:
            logger.info("lowering: where %s comes from is not understood; every network is exported", error)
            self._template = None
        return model


def _numbers(graph: fx.GraphModule) -> Iterator[tuple[str, int]]:
    """Every integer of an fx graph under a name that graphs of the same topology share."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            for name, value in sorted(vars(graph.get_submodule(node.target)).items()):
                yield from _flat(f"{node.target}.{name}", value)
        elif node.op == "call_function":
            yield from _flat(node.name, [node.args, node.kwargs])
    for name, tensor in graph.state_dict().items():
        yield from _flat(f"{name}.shape", list(tensor.shape))


def _flat(name: str, value: object) -> Iterator[tuple[str, int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, list | tuple):
        for k, item in enumerate(value):
            yield from _flat(f"{name}.{k}", item)
    elif isinstance(value, dict) and not name.endswith(("_parameters", "_buffers", "_modules")):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)


def _learn(examples: Sequence[_Example]) -> _Template:
    """A template from several comparable exports; raises `_UnknownOriginError`."""
    by_source = {name: tuple(e.numbers[name] for e in examples) for name in examples[0].numbers}
    sources: dict[tuple[int, ...], str] = {}
    for name, column in by_source.items():
        sources.setdefault(column, name)
    constants: list[onnx.TensorProto] = []
    weights: list[str] = []
    unsqueezed: list[tuple[str, str, tuple[int, ...]]] = []
    slots: list[_Slot] = []
    by_name = [{i.name: i for i in e.model.graph.initializer} for e in examples]
    for tensor in examples[0].model.graph.initializer:
        values = [numpy_helper.to_array(found[tensor.name]) for found in by_name]
        if tensor.name in examples[0].weights:
            if not all(_equal(v, e.weights[tensor.name]) for v, e in zip(values, examples, strict=True)):
                raise _UnknownOriginError(tensor.name)
            weights.append(tensor.name)
            continue
        if (weight := _weight_of(values, examples)) is not None:
            unsqueezed.append((tensor.name, weight, tuple(1 if n == 1 else -1 for n in values[0].shape)))
            continue
        found = _trace_back(values, sources)
        if found is None:
            raise _UnknownOriginError(tensor.name)
        slots += [_Slot("initializer", len(constants), "", element, source, sign) for element, source, sign in found]
        constants.append(tensor)
    for k, nodes in enumerate(zip(*[e.model.graph.node for e in examples], strict=True)):
        slots += _attribute_slots(k, nodes, sources, by_source)
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(examples[0].model)
    del skeleton.graph.initializer[:]
    del skeleton.graph.value_info[:]  # shapes of another network
    return _Template(skeleton, tuple(constants), tuple(weights), tuple(unsqueezed), tuple(slots))


def _weight_of(values: Sequence[np.ndarray], examples: Sequence[_Example]) -> str | None:
    """The weight (n,) that a constant (1, n, 1, 1) is in every example: the slopes of a PReLU are written so."""
    if not np.issubdtype(values[0].dtype, np.floating) or any(v.ndim < 2 or sum(n > 1 for n in v.shape) != 1 for v in values):
        return None
    for name, weight in examples[0].weights.items():
        if weight.dim() == 1 and all(_equal(v.reshape(-1), e.weights[name]) for v, e in zip(values, examples, strict=True)):
            return name
    return None


def _attribute_slots(
    index: int, nodes: Sequence[onnx.NodeProto], sources: dict[tuple[int, ...], str], columns: dict[str, tuple[int, ...]]
) -> Iterator[_Slot]:
    """Slots for the attributes in which the same node of several exports differs."""
    for attributes in zip(*[sorted(n.attribute, key=lambda a: a.name) for n in nodes], strict=True):
        name = attributes[0].name
        if name == "group" and all(a.i > 1 for a in attributes):
            # As many groups as the weight has filters: a depthwise convolution, also where these examples have equal widths.
            weight = f"{nodes[0].input[1]}.shape.0"
            if tuple(a.i for a in attributes) == columns.get(weight):
                yield _Slot("attribute", index, name, 0, weight, 1)
                continue
        if len({a.SerializeToString() for a in attributes}) == 1:
            continue
        found = None
        if attributes[0].type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
            found = _trace_back([np.asarray(onnx.helper.get_attribute_value(a)) for a in attributes], sources)
        if found is None:
            raise _UnknownOriginError(f"{nodes[0].name}.{name}")
        for element, source, sign in found:
            yield _Slot("attribute", index, name, element, source, sign)


def _comparable(one: _Example, other: _Example) -> bool:
    return tuple(one.numbers) == tuple(other.numbers) and _topology(one.model) == _topology(other.model)


def _topology(model: onnx.ModelProto) -> str:
    nodes = [(n.op_type, n.name, tuple(n.input), tuple(n.output), sorted(a.name for a in n.attribute)) for n in model.graph.node]
    return repr((nodes, sorted(i.name for i in model.graph.initializer)))


def _equal(array: np.ndarray, tensor: Tensor) -> bool:
    return array.shape == tuple(tensor.shape) and bool(np.array_equal(array, tensor.cpu().numpy()))


def _trace_back(values: Sequence[np.ndarray], sources: dict[tuple[int, ...], str]) -> list[tuple[int, str, int]] | None:
    """Where the elements in which constants differ come from: `(element, source, sign)`; None where that is unknown."""
    if len({v.shape for v in values}) > 1:
        return None
    flat = np.stack([v.reshape(-1) for v in values])
    differing = np.flatnonzero((flat != flat[0]).any(axis=0))
    if differing.size and not np.issubdtype(flat.dtype, np.integer):
        return None
    found = []
    for element in differing.tolist():
        column = flat[:, element].tolist()
        for sign in (1, -1):
            source = sources.get(tuple(sign * value for value in column))
            if source is not None:
                found.append((element, source, sign))
                break
        else:
            return None
    return found


def _written(template: _Template, numbers: dict[str, int], weights: dict[str, Tensor]) -> onnx.ModelProto | None:
    """The model of a network, or None where its shapes do not fit together."""
    model = onnx.ModelProto()
    model.CopyFrom(template.skeleton)
    arrays = [numpy_helper.to_array(tensor).copy() for tensor in template.constants]
    for slot in template.slots:
        if slot.source not in numbers:
            return None
        value = slot.sign * numbers[slot.source]
        if slot.kind == "initializer":
            arrays[slot.index].reshape(-1)[slot.element] = value
        else:
            attribute = next(a for a in model.graph.node[slot.index].attribute if a.name == slot.attribute)
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = value
            else:
                attribute.ints[slot.element] = value
    for tensor, array in zip(template.constants, arrays, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(array, tensor.name))
    for name, weight, shape in (*((name, name, None) for name in template.weights), *template.unsqueezed):
        if weight not in weights:
            return None
        own = weights[weight].detach().to("cpu", torch.float32 if weights[weight].is_floating_point() else None)
        array = own.contiguous().numpy() if shape is None else own.reshape(shape).numpy()
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        logger.info("lowering: written shapes do not fit (%s); exporting", str(error).splitlines()[0])
        return None
    return model
