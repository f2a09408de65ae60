"""Models that come as an ONNX file, by the package `onnx2torch`."""

import contextlib
import io
import warnings
from operator import attrgetter
from pathlib import Path

import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
import torch
from onnx import numpy_helper
from torch import fx, nn

from compressor.errors import DataError
from compressor.runtime.onnx.read import load_onnx

_VERSION = 17  # of ONNX's ops: up to this the converter knows nearly all


def from_onnx(path: str | Path) -> nn.Module:
    """A model from an ONNX file, in eval mode; to be traced, analyzed and compressed like any other.

    Args:
        path: The file. Weights are its initializers; nothing of it runs code.

    Raises:
        DataError: The file cannot be read, holds an op that the converter does not know, or `onnx2torch` is not there.
    """
    path = Path(path)
    proto = load_onnx(path)
    try:
        from onnx2torch import convert
    except (ImportError, RuntimeError) as error:  # a torchvision of another build than torch raises the latter
        raise DataError(f"models from ONNX need the package onnx2torch: pip install 'fx-compressor[onnx]' ({error})") from error
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            proto = _simple(proto)
            try:
                model = convert(proto)
            except NotImplementedError:  # of an op as later versions of ONNX have it: many can be written as before
                model = convert(_earlier(proto))
    except NotImplementedError as error:
        raise DataError(f"{path}: {_first_line(error)}; pass the PyTorch model that it was exported from") from error
    except Exception as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(
            f"{path}: onnx2torch cannot convert it ({said}); pass the PyTorch model that it was exported from"
        ) from error
    return _traceable(model.eval())


def _simple(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without what the converter stumbles over: computed constants, shapes put together at run time."""
    from onnxscript import optimizer

    proto = optimizer.optimize(proto)
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    known = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.graph.value_info, *inferred.graph.output)}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if len(tensor.dims) == 1}
    for k, node in enumerate(own for own in proto.graph.node if own.op_type == "Reshape"):
        if node.input[1] in constants and 0 not in constants[node.input[1]]:
            del node.attribute[:]  # that a zero is a zero, of which there is none
            continue
        sizes = [dim.dim_value or -1 for dim in known.get(node.output[0], ())]
        if sizes and sizes.count(-1) <= 1:  # one may be left open: the batch
            name = f"shape_of_reshape_{k}"
            proto.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
            node.input[1] = name
            del node.attribute[:]
    return optimizer.optimize(proto)  # what computed the shapes is not needed any more


def _earlier(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with the ops of an earlier version, where ONNX itself can write them so.

    Raises:
        NotImplementedError: It cannot.
    """
    try:
        return onnx.version_converter.convert_version(proto, _VERSION)
    except Exception as error:
        raise NotImplementedError(f"it is of opset {proto.opset_import[0].version}: export it with {_VERSION} or less") from error


def _traceable(model: fx.GraphModule) -> fx.GraphModule:
    """Reshape and PReLU as PyTorch has them: the converter reads shapes from tensors, and writes through a mask."""
    graph = model.graph
    for node in list(graph.nodes):
        kind = type(model.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""
        source = node.args[1] if kind in ("OnnxReshape", "OnnxPReLU") else None
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            continue
        value = attrgetter(str(source.target))(model)
        with graph.inserting_before(node):
            if kind == "OnnxPReLU":
                plain = graph.call_function(torch.prelu, (node.args[0], graph.call_method("flatten", (source,))))
            elif 0 not in value:
                plain = graph.call_method("reshape", (node.args[0], *value.tolist()))
            else:
                continue
        node.replace_all_uses_with(plain)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    model.recompile()
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
