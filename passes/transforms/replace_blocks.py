"""Branches out of the user's own module: the block that adds one is replaced by what is left of it, often nothing."""

from collections.abc import Sequence
from typing import cast

from torch import fx, nn

from compressor.errors import PlanError
from compressor.passes.channels.branches import Branch
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.remove_branches import rewiring

_STACK = "nn_module_stack"  # torch.export's: key -> (path of a module, its type), the innermost last


def blocks_without(branches: Sequence[Branch], traced: fx.GraphModule, left: fx.GraphModule) -> dict[str, nn.Module]:
    """What to put in the place of each block: path of a module -> the module.

    Args:
        branches: Those that go.
        traced: The whole graph.
        left: The graph without them.

    Raises:
        PlanError: The addition is in the `forward` of the whole model, or its block is no function of one tensor to one tensor.
    """
    nodes = {node.name: node for node in traced.graph.nodes}
    instead = rewiring(traced.graph, branches).instead
    found: dict[str, nn.Module] = {}
    for branch in branches:
        path = next(reversed(_paths(nodes[branch.at])), "")
        if path in found:
            continue
        if not path:
            raise _refused(branch, "it is added in the `forward` of the model itself")
        inside = [node for node in nodes.values() if path in _paths(node)]
        read = {source for node in inside for source in node.all_input_nodes if source not in inside and source.op != "get_attr"}
        given = [node for node in inside if any(user not in inside for user in node.users)]
        if len(read) != 1 or len(given) != 1:
            raise _refused(branch, f"`{path}` takes {len(read)} tensors and gives {len(given)}")
        start, end = (instead.get(own.name, own.name) for own in (read.pop(), given[0]))
        found[path] = _between(left, start, end, path, branch)
    return found


def replace_modules(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put modules in the place of others, in place."""
    for path, module in modules.items():
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, quiet_deepcopy(module).train(model.training))


def _paths(node: fx.Node) -> list[str]:
    """The modules that a node was called in, the innermost last; not the layer itself."""
    stack = cast("dict[str, tuple[str, object]]", node.meta.get(_STACK) or {})
    return [path for path, _ in stack.values() if path and path != node.target]


def _between(graph: fx.GraphModule, start: str, end: str, path: str, branch: Branch) -> nn.Module:
    """What a graph computes from one node to another, with modules under the names that they have below `path`."""
    if start == end:
        return nn.Identity()
    nodes = {node.name: node for node in graph.graph.nodes}
    part, modules = fx.Graph(), dict[str, nn.Module]()
    copies = {nodes[start]: part.placeholder("x")}
    needed, waiting = {nodes[end]}, [nodes[end]]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.name != start and source not in needed:
                needed.add(source)
                waiting.append(source)
    for node in graph.graph.nodes:
        if node not in needed:
            continue
        if node.op == "call_module" and str(node.target).startswith(f"{path}."):
            modules[str(node.target).removeprefix(f"{path}.")] = graph.get_submodule(str(node.target))
        elif node.op != "call_function":
            raise _refused(branch, f"`{path}` reads `{node.target}` from elsewhere")
        copies[node] = part.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            copies[node].target = str(node.target).removeprefix(f"{path}.")
    part.output(copies[nodes[end]])
    return fx.GraphModule(modules, part)


def _refused(branch: Branch, why: str) -> PlanError:
    return PlanError(
        f"branch `{branch.name}` cannot be removed in place: {why}; apply the plan to the traced graph instead "
        "(compressor.trace(model, inputs))"
    )
