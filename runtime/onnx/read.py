"""ONNX files that somebody else may have written: checked before any library follows what they name.

Tensors may lie in files beside the model: only plain ones in its own folder are read. Ops may be of any maker: only ONNX's own
and ONNX Runtime's are taken. A tensor may claim any size: it has to be the size of its data.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, external_data_helper

from compressor.errors import DataError
from compressor.values.files import read_bytes

_MOST_ELEMENTS = 1 << 26  # of a constant that is made from its shape alone
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file and the tensors beside it.

    Raises:
        DataError: It is missing, cut off, no ONNX, or names files outside its folder or ops of other makers.
    """
    if not path.exists():
        raise DataError(f"no such file: {path}")
    return onnx_from(read_bytes(path), path)


def onnx_from(data: bytes, path: Path, alone: bool = False) -> onnx.ModelProto:
    """The model of a file's bytes; see `load_onnx`. One that is to stand alone has no tensors in other files."""
    try:
        model = onnx.ModelProto()
        model.ParseFromString(data)
        for graph in _graphs(model):
            _check_ops(graph)
            for tensor in _tensors(graph):
                if alone and tensor.data_location == TensorProto.EXTERNAL:
                    raise DataError(f"tensor `{tensor.name}` lies in another file, which no file of a run does")
                _check_tensor(tensor, path.parent)
        external_data_helper.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # protobuf's and the checker's errors have no common class
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is no ONNX model, or cut off: {line}") from error
    return model


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Every graph, those inside of nodes included."""
    waiting: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _check_ops(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = isinstance(graph, onnx.GraphProto) and len(graph.sparse_initializer)
    if sparse or any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in attributes):
        raise DataError("the model holds sparse tensors, a few bytes of which may stand for gigabytes")
    constants = {item.name: item for item in graph.initializer} if isinstance(graph, onnx.GraphProto) else {}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in constants:
            sizes = onnx.numpy_helper.to_array(constants[node.input[0]])
            if math.prod(int(size) for size in sizes.reshape(-1)) > _MOST_ELEMENTS:
                raise DataError(f"node `{node.name}` makes a tensor of the shape {sizes.tolist()}")
    strange = next((node for node in graph.node if node.domain not in _DOMAINS), None)
    if strange is not None:
        raise DataError(f"node `{strange.name}` is {strange.domain}.{strange.op_type}, an op of another maker; only ONNX's are run")


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[TensorProto]:
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]


def _check_tensor(tensor: TensorProto, folder: Path) -> None:
    if any(size < 0 for size in tensor.dims):
        raise DataError(f"tensor `{tensor.name}` has the shape {list(tensor.dims)}")
    try:
        bytes_each = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"tensor `{tensor.name}` is of no type that is known") from error
    small = any(mark in TensorProto.DataType.Name(tensor.data_type) for mark in ("INT4", "INT2", "FLOAT4"))
    elements = math.prod(tensor.dims)
    external = tensor.data_location == TensorProto.EXTERNAL
    size = _external_size(tensor, folder) if external else len(tensor.raw_data)
    if (external or tensor.HasField("raw_data")) and not small and tensor.data_type != TensorProto.STRING:
        if size != elements * bytes_each:
            raise DataError(f"tensor `{tensor.name}` has the shape {list(tensor.dims)} and {size:,} bytes of data")
    elif elements > 16 * tensor.ByteSize():
        raise DataError(f"tensor `{tensor.name}` has the shape {list(tensor.dims)}, for which it holds no data")


def _external_size(tensor: TensorProto, folder: Path) -> int:
    """Bytes of a tensor's data in a file beside the model."""
    about = {entry.key: entry.value for entry in tensor.external_data}
    location = about.get("location", "")
    file = folder / location
    plain = location and not Path(location).is_absolute() and ".." not in Path(location).parts
    try:
        inside = plain and file.resolve().is_relative_to(folder.resolve()) and file.is_file() and not file.is_symlink()
        offset, length = int(about.get("offset", 0)), int(about.get("length", file.stat().st_size if inside else 0))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"tensor `{tensor.name}`: its data cannot be found ({error})") from error
    if not inside or not 0 <= offset <= offset + length <= file.stat().st_size:
        raise DataError(f"tensor `{tensor.name}` names {location!r}, which is no part of a plain file in the model's folder")
    return length
