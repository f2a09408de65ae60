"""The sentinel: a small fixed network that is timed beside every other, to see drift and the noise floor."""

from functools import cache

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

from compressor.passes.tracing.trace import trace
from compressor.runtime.backends.base import Workload

_CHANNELS, _SIZE, _LAYERS = 32, 28, 3


def sentinel_workload() -> Workload:
    """Three 3x3 convolutions of 32 channels on 28x28 pixels, 22 million MACs, always the same; a graph and its ONNX."""
    example = (torch.randn(1, _CHANNELS, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0)),)
    weight = np.random.default_rng(0).normal(0, 0.06, (_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32)
    nodes, name = [], "x"
    for k in range(_LAYERS):
        last = "y" if k == _LAYERS - 1 else f"relu{k}"
        nodes.append(helper.make_node("Conv", [name, "weight"], [f"conv{k}"], name=f"conv{k}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"conv{k}"], [last], name=last))
        name = last
    shape = [1, _CHANNELS, _SIZE, _SIZE]
    tensors = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "sentinel", tensors[:1], tensors[1:], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Workload(example, _traced(weight.tobytes()), model)


@cache
def _traced(weight: bytes) -> fx.GraphModule:
    layers: list[nn.Module] = []
    for _ in range(_LAYERS):
        conv = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False)
        conv.weight.data.copy_(torch.from_numpy(np.frombuffer(weight, np.float32).reshape(conv.weight.shape).copy()))
        layers += [conv, nn.ReLU()]
    return trace(nn.Sequential(*layers).eval(), (torch.zeros(1, _CHANNELS, _SIZE, _SIZE),))
