"""ONNX models at lower precision: FP16 by conversion, INT8 by static quantization (explicit Q/DQ).

Both are done in the ONNX graph, because TensorRT from 11 on (and TensorRT-RTX) is strongly typed: it takes the
precision from the graph, and nothing else. Inputs and outputs stay FP32, so that every precision is a drop-in.
"""

import contextlib
import graphlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import BackendError

logger = logging.getLogger(__name__)

PARITY: Mapping[str, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.2}
"""Relative error (L2) allowed between an engine's outputs and PyTorch's in float32.

fp32: other kernels sum in another order, and norms folded into weights round once more: under 1e-6 on ResNet-56; a
wrong graph is off by 1e-2 or more. fp16 has 11 bits (1e-3 per rounding, which largely cancel over a layer), bf16 has 8.
int8: 7 bits per tensor or channel; 1 to 10 % on trained networks. It only tells a working engine from a broken one,
which is off by about 1: what INT8 costs is told by the accuracy on validation data.
"""


@dataclass(frozen=True)
class Int8:
    """A form of static quantization.

    Attributes:
        activations: `int8`: symmetric, quantized in front of convolutions and matrix products and nowhere else, biases
            left alone. TensorRT takes this one: its parser refuses the int32 DequantizeLinear that ONNX Runtime puts on biases
            by default ("input has type Int32 but must have type FP8, ..."), and a Q behind a convolution keeps it from fusing
            with its activation. `uint8`: asymmetric, around every op, ONNX Runtime's own way on CPUs: a ReLU then
            disappears into the zero point; without that, convolutions stay in float (`compressor profile --layers` shows it).
        weight_bits: 8, or 7 for processors without VNNI (AVX2, the first AVX-512), which add two products in 16 bits: with
            8-bit weights that saturates. A network of three convolutions was off by 26 %, with 7 bits by 0.9 %.
        weight_pairs: Keep weights in float with a Q/DQ pair behind them, as TensorRT 8 wants them.
    """

    activations: Literal["int8", "uint8"] = "int8"
    weight_bits: Literal[7, 8] = 8
    weight_pairs: bool = False


_PRODUCTS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]

Converter = Callable[[onnx.ModelProto, Sequence[tuple[Tensor, ...]], "Int8 | None"], onnx.ModelProto]


def converted(
    model: onnx.ModelProto, precision: str, calibration: Sequence[tuple[Tensor, ...]], form: Int8 | None = None
) -> onnx.ModelProto:
    """A model at a precision; `model` itself for fp32.

    Args:
        model: An fp32 model.
        precision: `fp32`, `fp16` or `int8`.
        calibration: Inputs for INT8.
        form: Which INT8; by default the one that TensorRT takes.

    Raises:
        BackendError: There is no such precision in ONNX, or the converter refuses the model.
    """
    if precision == "fp32":
        return model
    if precision not in CONVERTERS:
        raise BackendError(f"ONNX models are not converted to {precision!r}; there are fp32, {', '.join(CONVERTERS)}")
    try:
        with _quiet():
            return CONVERTERS[precision](model, calibration, form)
    except Exception as error:
        raise BackendError(f"the model cannot be converted to {precision}: {str(error).splitlines()[0]}") from error


def to_fp16(model: onnx.ModelProto, calibration: Sequence[tuple[Tensor, ...]] = (), form: Int8 | None = None) -> onnx.ModelProto:
    """Weights and arithmetic in half precision, inputs and outputs in single, by ONNX Runtime's converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    del calibration, form
    largest = float(np.finfo(np.float16).max)  # the converter's own limit is 1e4
    result: onnx.ModelProto = convert_float_to_float16(_copy(model), keep_io_types=True, max_finite_val=largest)
    _sort(result.graph)
    return result


def _sort(graph: onnx.GraphProto) -> None:
    """Every node behind those that it reads: the converter puts its casts at the end, which no checker takes."""
    makers = {output: k for k, node in enumerate(graph.node) for output in node.output}
    reads = {k: {makers[name] for name in node.input if name in makers} for k, node in enumerate(graph.node)}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    order = graphlib.TopologicalSorter(reads).static_order()
    del graph.node[:]
    graph.node.extend(nodes[k] for k in order)


def to_int8(model: onnx.ModelProto, calibration: Sequence[tuple[Tensor, ...]], form: Int8 | None = None) -> onnx.ModelProto:
    """Static quantization with Q/DQ nodes; see `Int8` for the forms. Weights are symmetric, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    chosen = form or Int8()
    names = [item.name for item in model.graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(calibration)

        def get_next(self) -> dict[str, NDArray[np.generic]] | None:
            """The next inputs by name."""
            batch = next(self._left, None)
            return None if batch is None else {n: x.numpy() for n, x in zip(names, batch, strict=True)}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        options: dict[str, object] = {"WeightSymmetric": True}
        if chosen.weight_pairs:
            options["AddQDQPairToWeight"] = True
        if chosen.activations == "int8":
            options |= {"ActivationSymmetric": True, "QuantizeBias": False, "OpTypesToExcludeOutputQuantization": _PRODUCTS}
        quantize_static(
            _copy(model), path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=chosen.weight_bits == 7, op_types_to_quantize=_PRODUCTS if chosen.activations == "int8" else None,
            activation_type=QuantType.QInt8 if chosen.activations == "int8" else QuantType.QUInt8,
            weight_type=QuantType.QInt8, extra_options=options,
        )  # fmt: skip
        return onnx.load(path)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Both converters change their argument."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


CONVERTERS: Mapping[str, Converter] = {"fp16": to_fp16, "int8": to_int8}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters warn on the root logger about pre-processing that our models do not need."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
