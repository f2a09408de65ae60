"""A layer of a network as a factorized form sees it: its sizes, the blocks of its weight, and whether the form can take it."""

from typing import cast

import numpy as np
from torch import Tensor, fx, nn

from compressor.errors import PlanError
from compressor.passes.layers.forms import FORMS, Form, Sizes
from compressor.passes.layers.product import Conv, Transposed, is_product
from compressor.values.plan import Factorization


def sizes_of(layer: nn.Module) -> Sizes:
    """Of one block of a layer.

    Raises:
        PlanError: It is no convolution and no linear layer.
    """
    if isinstance(layer, Conv):
        return Sizes(layer.out_channels // layer.groups, layer.in_channels // layer.groups, layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return Sizes(layer.out_features, layer.in_features, ())
    raise PlanError(f"a {type(layer).__name__} cannot be factorized")


def blocks_of(layer: nn.Module) -> np.ndarray:
    """Weight of a layer, block by block: (blocks, outputs, inputs, *kernel), float64."""
    weight = cast(Tensor, layer.weight).detach().double().cpu()
    if not isinstance(layer, Conv):
        return weight[None].numpy()
    wide = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return np.ascontiguousarray((wide.transpose(1, 2) if isinstance(layer, Transposed) else wide).numpy())


def form_of(one: Factorization, sizes: Sizes) -> Form:
    """The form of a factorization, if a layer of these sizes can take it.

    Raises:
        PlanError: It cannot, or a rank is not possible; the layer and the reason are said.
    """
    form = FORMS.get(one.form)
    if form is None:
        raise PlanError(f"layer `{one.layer}`: there is no form `{one.form}`; there are {', '.join(FORMS)}")
    reason = form.refuses(sizes)
    if reason is not None:
        raise PlanError(f"layer `{one.layer}` cannot be factorized as {one.form}: {reason}")
    full = form.full(sizes)
    if len(one.ranks) != len(full):
        raise PlanError(f"layer `{one.layer}`: {one.form} has {len(full)} ranks, found {len(one.ranks)}")
    if any(not 1 <= rank <= most for rank, most in zip(one.ranks, full, strict=True)):
        raise PlanError(f"layer `{one.layer}`: ranks of {one.form} lie between 1 and {list(full)}, found {list(one.ranks)}")
    return form


def factorizable(gm: fx.GraphModule, form: Form) -> dict[str, str | None]:
    """Every convolution and linear layer -> None where it can take a form, else the reason."""
    found: dict[str, str | None] = {}
    for node in gm.graph.nodes:
        if is_product(gm, node):
            layer = str(node.target)
            try:
                node_of(gm, layer)
            except PlanError as error:
                found[layer] = str(error)
            else:
                found[layer] = form.refuses(sizes_of(gm.get_submodule(layer)))
    return found


def node_of(gm: fx.GraphModule, layer: str) -> fx.Node:
    """The node of a layer that can be factorized.

    Raises:
        PlanError: It is called several times, shares its weight, or is no convolution and no linear layer.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "call_module" and str(node.target) == layer]
    if len(nodes) != 1:
        raise PlanError(f"layer `{layer}` is called {len(nodes)} times, only one that is called once can be factorized")
    if not is_product(gm, nodes[0]):
        raise PlanError(f"layer `{layer}` is a {type(gm.get_submodule(layer)).__name__}, no convolution and no linear layer")
    own = {id(parameter) for parameter in gm.get_submodule(layer).parameters()}
    owners = [name for name, p in gm.named_parameters(remove_duplicate=False) if id(p) in own and name.rpartition(".")[0] != layer]
    read = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target).rpartition(".")[0] == layer]
    if owners or read:
        raise PlanError(f"layer `{layer}` shares its weight with {owners[0] if owners else read[0].name}")
    return cast(fx.Node, nodes[0])
