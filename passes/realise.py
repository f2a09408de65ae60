"""From a plan to its network: channels are removed, then layers factorized."""

from torch import fx

from compressor.passes.channels import ChannelGraph
from compressor.passes.factorize_conv import FactorizeConv
from compressor.passes.remove_channels import RemoveChannels
from compressor.plan import Plan


def realised(plan: Plan, channels: ChannelGraph, weights: bool = True) -> fx.GraphModule:
    """The network of a plan; the original is left alone.

    Args:
        plan: What stays, and what is factorized.
        channels: The analysis of the original.
        weights: Whether factorized layers get their weights, or only their shapes, for weights that are loaded afterwards.

    Raises:
        PlanError: The plan does not fit.
    """
    graph = RemoveChannels(plan, channels)(channels.graph).graph
    return FactorizeConv(plan.factors, weights)(graph).graph
