"""PRACTISE, from its description (Wang and Wu, "Practical Network Acceleration with Tiny Sets", 2023), as a peer to compare with.

    for each block that keeps its shape     it is removed; 1x1 adaptors, the identity at first, behind the last convolution of every
                                            earlier block of the stage and in front of the first of every later one (and of the next
                                            stage's first) are trained alone to give the original's features in front of the pooling
    score                                   the error that is left / the latency saved in percent
    the blocks of the lowest scores go      at once, as many as the latency asks for; then all weights are trained likewise

The adaptors are parts of the convolutions' weights (`torch.nn.utils.parametrize`), which absorb them exactly.
"""

from collections.abc import Sequence

import torch
from benching import measured_in
from torch import nn
from torch.nn.utils import parametrize

from compressor.errors import BudgetError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.branches import Branch
from compressor.passes.layers.product import is_product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.measuring.measure import Comparison
from compressor.training.mimic import Mimic, mimic
from compressor.values.plan import Plan


class Adaptor(nn.Module):
    """A 1x1 convolution in front of another, or behind it, as a part of its weight."""

    def __init__(self, channels: int, behind: bool) -> None:
        super().__init__()
        self.matrix, self.behind = nn.Parameter(torch.eye(channels)), behind

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("po,oikl->pikl" if self.behind else "ip,oikl->opkl", self.matrix, weight)


def stages_of(channels: ChannelGraph) -> list[list[Branch]]:
    """Residual branches by stage: those in a row whose sums have one shape."""
    nodes = {node.name: node for node in channels.graph.graph.nodes}
    stages: list[list[Branch]] = []
    shape = None
    for branch in channels.branches:
        if branch.gate:
            continue
        own = shapes_of(nodes[branch.at])
        if own != shape:
            stages.append([])
        stages[-1].append(branch)
        shape = own
    return stages


def practise(
    channels: ChannelGraph, images: Calibration, comparison: Comparison, limit: float, settings: Mimic
) -> tuple[Plan, dict[str, float]]:
    """The blocks that PRACTISE removes to meet a latency.

    Args:
        channels: The analysis of the network.
        images: Without labels.
        comparison: What measures.
        limit: Share of the latency.
        settings: Of the adaptors' training.

    Returns:
        The plan, and the score of each block; at least one block stays in every stage: its first, which changes the shape.
    """
    scores: dict[str, float] = {}
    stages = stages_of(channels)
    for index, stage in enumerate(stages):
        following = stages[index + 1][0] if index + 1 < len(stages) else None
        for place, branch in enumerate(stage[1:], start=1):
            plan = Plan.keep({}, channels.digest, removed=[branch.name])
            saved = 1 - measured_in(comparison, channels, plan).ratio
            graph = applied(plan, channels).eval().requires_grad_(False)
            later = [*stage[place + 1 :], *([following] if following else [])]
            adapt(channels, graph, stage[:place], later)
            error = mimic(graph, channels, plan, images, settings).after
            scores[branch.name] = error / max(100 * saved, 1e-3)
            print(f"practise: {branch.name}: error {error:.4f}, saves {100 * saved:.2f} % of the latency", flush=True)
    order = sorted(scores, key=scores.__getitem__)
    low, high = 1, len(order)  # the fewest that are fast enough
    while low < high:
        middle = (low + high) // 2
        ratio = measured_in(comparison, channels, Plan.keep({}, channels.digest, removed=order[:middle])).ratio
        low, high = (low, middle) if ratio <= limit else (middle + 1, high)
    plan = Plan.keep({}, channels.digest, removed=order[:low])
    if low == len(order) and (ratio := measured_in(comparison, channels, plan).ratio) > limit:
        raise BudgetError(f"the budget cannot be met: without all blocks that may go {ratio:.3f} of the latency is left")
    return plan, scores


def adapt(channels: ChannelGraph, graph: nn.Module, earlier: Sequence[Branch], later: Sequence[Branch]) -> None:
    """Register adaptors; nothing else is to be trained."""
    nodes = {node.name: node for node in channels.graph.graph.nodes}
    for branches, which, behind in ((earlier, -1, True), (later, 0, False)):
        for branch in branches:
            products = [str(nodes[name].target) for name in branch.nodes if is_product(channels.graph, nodes[name])]
            layer = graph.get_submodule(products[which])
            parametrize.register_parametrization(layer, "weight", Adaptor(layer.weight.shape[0 if behind else 1], behind))
