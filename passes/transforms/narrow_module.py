"""Apply a plan to the original `nn.Module` in place, where its `forward` allows it."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from compressor.errors import PlanError
from compressor.passes.channels.branches import branches_of
from compressor.passes.tracing.reparametrized import reparametrized
from compressor.passes.tracing.trace import DYNAMIC, device_of, example_inputs_of, outputs_of
from compressor.passes.transforms.remove_branches import branches_named
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.passes.transforms.replace_blocks import blocks_without, replace_modules
from compressor.passes.transforms.update_attributes import fit
from compressor.passes.transforms.verify import TOLERANCE, relative_error
from compressor.values.plan import Plan


def narrow_module(plan: Plan, model: nn.Module, traced: fx.GraphModule) -> nn.Module:
    """Narrow the parameters and buffers of `model` in place, and replace blocks whose branch goes by what is left of them.

    A copy is narrowed first and compared with the narrowed graph, so that a model whose `forward` depends
    on a size in any way is refused and stays as it was.

    Args:
        plan: What stays.
        model: The original model.
        traced: Its traced graph.

    Raises:
        PlanError: The plan does not fit, or `forward` does not work with the new sizes; it is said where.
    """
    if computed := reparametrized(model):
        raise PlanError(
            f"the model cannot be narrowed in place: it computes `{computed[0]}` from other tensors; make the weights plain first "
            "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm), or apply the plan to the traced graph"
        )
    narrowed, whole, blocks = RemoveChannels(plan)(traced).graph, traced, dict[str, nn.Module]()
    if plan.removed:
        whole = RemoveChannels(Plan.keep({}, plan.model, removed=plan.removed))(traced).graph
        blocks = blocks_without(branches_named(branches_of(traced), plan.removed), traced, whole)
    edited = _edited(whole, narrowed)
    if edited:
        raise PlanError(
            f"the model cannot be narrowed in place: `forward` holds sizes that would need editing ({', '.join(edited[:5])}); "
            "apply the plan to the traced graph instead"
        )
    twin = copy.deepcopy(model)
    replace_modules(twin, blocks)
    _narrow(twin, narrowed)
    _compare(twin, narrowed)
    replace_modules(model, blocks)
    _narrow(model, narrowed)
    return model


def _edited(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """Functions of the graph whose constants differ."""
    new = {node.name: node for node in after.graph.nodes}
    functions = [node for node in before.graph.nodes if node.op == "call_function"]
    return [n.name for n in functions if n.target is not new[n.name].target or _constants(n) != _constants(new[n.name])]


def _constants(node: fx.Node) -> str:
    """Arguments as a text, in which nodes appear by name."""
    return repr((node.args, node.kwargs))


def _narrow(model: nn.Module, narrowed: fx.GraphModule) -> None:
    """Replace every tensor that has become smaller, under all names that it has."""
    new = dict([*narrowed.named_parameters(), *narrowed.named_buffers()])
    places = list(_tensors(model))
    modules = dict(narrowed.named_modules())
    replaced: dict[int, Tensor] = {}
    for _, _, name, tensor in places:
        if name in new and new[name].shape != tensor.shape:
            value = new[name].detach().to(tensor.device).clone()
            replaced[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    for owner, leaf, _, tensor in places:
        if id(tensor) in replaced:
            setattr(owner, leaf, replaced[id(tensor)])
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            fit(module)
    for path, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and isinstance(twin := modules.get(path), nn.GroupNorm):
            module.num_groups = twin.num_groups


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """`(owner, leaf, qualified name, tensor)` of every parameter and buffer, once per name."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield module, leaf, f"{path}.{leaf}".lstrip("."), tensor


def _compare(model: nn.Module, narrowed: fx.GraphModule) -> None:
    model.eval()
    expected = copy.deepcopy(narrowed).eval()
    for batch in (2, 3) if narrowed.meta[DYNAMIC] else (None,):
        inputs = [x.to(device_of(narrowed)) for x in example_inputs_of(narrowed, batch)]
        try:
            with torch.no_grad():
                error = relative_error(outputs_of(model(*inputs)), outputs_of(expected(*inputs)))
        except Exception as failure:
            raise PlanError(
                f"the model cannot be narrowed in place: its `forward` fails with the new sizes ({failure}); "
                "apply the plan to the traced graph instead"
            ) from failure
        if error > TOLERANCE:
            raise PlanError(
                f"the model cannot be narrowed in place: its `forward` computes with sizes (relative difference {error:.1e}); "
                "apply the plan to the traced graph instead"
            )
