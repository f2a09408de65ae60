"""Gathers: a layer reads some channels of a stream that others read whole.

    x ──► index_select(x, channels) ──► layer with fewer inputs

The stream keeps its width, the layer's weight is narrowed alone. What that saves in the layer it may lose in the copy,
so a plan asks for it (`Plan.reads`) only where it was measured to pay.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from compressor.passes.layers.product import Product, Transposed
from compressor.passes.tracing.shapes import VALUE, shapes_of
from compressor.passes.transforms.update_attributes import fit


def gather_inputs(gm: fx.GraphModule, chosen: Mapping[str, NDArray[np.int64]]) -> None:
    """Insert gathers; `gm` is changed in place.

    Args:
        gm: A graph.
        chosen: Node of a layer that is called once and has one block -> positions of its input that it goes on reading.
    """
    for node in list(gm.graph.nodes):
        if node.name not in chosen:
            continue
        layer = str(node.target)
        module = gm.get_submodule(layer)
        product = Product(module)
        index = torch.from_numpy(chosen[node.name].astype(np.int64)).to(product.weight.device)
        axis = 0 if isinstance(module, Transposed) else 1
        module.weight = torch.nn.Parameter(product.weight.detach().index_select(axis, index), product.weight.requires_grad)
        fit(module)
        name = f"{node.name}_reads"
        gm.register_buffer(name, index)
        source = node.all_input_nodes[0]
        shape = list(shapes_of(source)[0])
        channel_axis = product.channel_axis % len(shape)
        shape[channel_axis] = len(index)
        with gm.graph.inserting_before(node):
            stored = gm.graph.get_attr(name)
            gathered = gm.graph.call_function(torch.ops.aten.index_select.default, (source, channel_axis, stored))
        stored.meta[VALUE], gathered.meta[VALUE] = (len(index),), tuple(shape)
        node.replace_input_with(source, gathered)
    gm.graph.lint()
    gm.recompile()
