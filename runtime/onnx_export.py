"""Lower a traced graph to ONNX: dynamic batch, names of inputs and weights kept."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, fx

from compressor.errors import BackendError
from compressor.passes.trace import DYNAMIC

logger = logging.getLogger(__name__)


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
    shapes: Any = None
    inputs = tuple(x.detach() for x in example)
    if graph.meta.get(DYNAMIC):
        inputs = tuple(torch.cat([x, x])[:2] if x.shape[0] == 1 else x for x in inputs)
        batch = torch.export.Dim("batch", min=1, max=1 << 20)
        shapes = ({0: batch},) * len(inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                graph, inputs, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, optimize=True
            )
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackendError(f"the graph cannot be exported to ONNX: {line}") from error
    finally:
        graph.train(training)
    if program is None:
        raise BackendError("the ONNX exporter returned nothing")
    surgeon = gs.import_onnx(program.model_proto)
    model: onnx.ModelProto = gs.export_onnx(surgeon.cleanup().toposort())
    logger.info("onnx: %d nodes, opset %d", len(model.graph.node), model.opset_import[0].version)
    return model


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
