"""Lower a traced graph to ONNX: dynamic batch, names of inputs and weights kept."""

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, fx

from compressor.errors import BackendError
from compressor.passes.tracing.constants import fold_literals
from compressor.passes.tracing.trace import DYNAMIC, on_cpu, quiet_deepcopy
from compressor.passes.transforms.fold_batchnorm import FoldBatchNorm

logger = logging.getLogger(__name__)

LAYER = "compressor.layer"
"""Metadata key of ONNX nodes: qualified name of the PyTorch module that a node comes from."""


def to_onnx(graph: fx.GraphModule, example: Sequence[Tensor]) -> onnx.ModelProto:
    """Export a graph in eval mode.

    Args:
        graph: A traced graph; its train or eval mode is as before afterwards.
        example: Inputs of any batch size.

    Raises:
        BackendError: The exporter refuses the graph; its first line is quoted.
    """
    training = graph.training
    graph.eval()
    exported = FoldBatchNorm()(with_final_weights(on_cpu(graph))).graph
    shapes: Any = None
    inputs = tuple(x.detach() for x in example)
    if graph.meta.get(DYNAMIC):
        inputs = tuple(torch.cat([x, x])[:2] if x.shape[0] == 1 else x for x in inputs)
        batch = torch.export.Dim("batch", min=1, max=1 << 20)
        shapes = ({0: batch},) * len(inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                exported, inputs, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, optimize=True
            )
    except Exception as error:
        cause: BaseException = error  # the exporter wraps what went wrong in advice on how to report it
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise BackendError(f"the graph cannot be exported to ONNX: {line}") from error
    finally:
        graph.train(training)
    if program is None:
        raise BackendError("the ONNX exporter returned nothing")
    layers = _layers(program.model_proto)
    surgeon = gs.import_onnx(program.model_proto)
    _keep_padding_apart(surgeon)
    model: onnx.ModelProto = gs.export_onnx(surgeon.cleanup().toposort())
    for node in model.graph.node:  # the surgeon drops what the exporter had noted
        if layers.get(node.name):
            node.metadata_props.add(key=LAYER, value=layers[node.name])
    logger.info("onnx: %d nodes, opset %d", len(model.graph.node), model.opset_import[0].version)
    return model


def _layers(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> the innermost module whose forward it comes from (the exporter lists all, then the op itself)."""
    found = {}
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        found[node.name] = modules[-1] if modules else ""
    return found


def _keep_padding_apart(surgeon: gs.Graph) -> None:
    """Pad with 1e-38 instead of 0 in front of a maximum.

    ONNX Runtime (1.31, also at its basic level) fuses a zero padding into the MaxPool behind it, whose own padding
    counts as minus infinity: wrong wherever everything that a window sees is negative. On timm's resnetv2_50x1_bit
    the outputs were off by a relative 2e-2. It leaves paddings with another number than 0 alone.
    """
    for node in surgeon.nodes:
        sources = node.inputs[0].inputs if node.op == "MaxPool" else []
        if sources and sources[0].op == "Pad" and sources[0].attrs.get("mode", "constant") == "constant":
            pad = sources[0]
            value = np.array(1e-38, dtype=np.float32)
            given = pad.inputs[2] if len(pad.inputs) > 2 else None
            if given is None or (isinstance(given, gs.Constant) and float(given.values) == 0.0):
                pad.inputs = [*list(pad.inputs)[:2], gs.Constant(f"{pad.name}_not_zero", value), *list(pad.inputs)[3:]]


def with_final_weights(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy in which weights that are computed from parameters alone (weight standardisation) are constants."""
    stored = [node for node in graph.graph.nodes if node.op == "get_attr"]
    if not any(_only_stored(user) for node in stored for user in node.users):
        return graph
    copied = quiet_deepcopy(graph)
    tensors = {**dict(copied.named_parameters(remove_duplicate=False)), **dict(copied.named_buffers(remove_duplicate=False))}
    root: dict[str, object] = {str(node.target): tensors[str(node.target)] for node in stored if str(node.target) in tensors}
    for name in fold_literals(copied.graph, root, (), largest=1 << 30):
        copied.register_buffer(name, cast(Tensor, root[name]))
    copied.graph.lint()
    copied.recompile()
    return copied


def _only_stored(node: fx.Node) -> bool:
    return node.op == "call_function" and all(source.op == "get_attr" for source in node.all_input_nodes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own internals; its errors still come through."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        levels = [one.level for one in loggers]
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
