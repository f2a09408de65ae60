"""Apply a plan to the original `nn.Module` in place, where its `forward` allows it."""

import numpy as np
import torch
from torch import fx, nn

from compressor.errors import PlanError
from compressor.passes.channels import analyze
from compressor.passes.remove_channels import RemoveChannels, fit
from compressor.plan import Plan


def narrow_module(plan: Plan, model: nn.Module, traced: fx.GraphModule) -> nn.Module:
    """Narrow the parameters and buffers of `model` in place.

    Args:
        plan: What stays.
        model: The original model.
        traced: Its traced graph.

    Raises:
        PlanError: The plan does not fit, or a constant in `forward` would need editing; it is named, and
            the model is untouched.
    """
    channels = analyze(traced)
    narrowed = RemoveChannels(plan, channels)(traced).graph
    after = {node.name: node for node in narrowed.graph.nodes}
    edited = [
        node.name
        for node in traced.graph.nodes
        if node.op == "call_function"
        and (str(node.target) != str(after[node.name].target) or _constants(node) != _constants(after[node.name]))
    ]
    if edited:
        raise PlanError(
            f"the model cannot be narrowed in place: `forward` holds sizes that would need editing ({', '.join(edited[:5])}); "
            "apply the plan to the traced graph instead"
        )
    new = narrowed.state_dict()
    with torch.no_grad():
        for name, tensor in list(model.state_dict(keep_vars=True).items()):
            if name in new and new[name].shape != tensor.shape:
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                value = new[name].to(tensor.device)
                setattr(owner, leaf, nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            fit(module)
    return model


def _constants(node: fx.Node) -> str:
    """Arguments without the nodes among them, for comparison."""
    return repr(fx.node.map_arg((node.args, node.kwargs), lambda n: np.str_("node")))
