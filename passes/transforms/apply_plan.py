"""From a plan to its network: channels are removed, then layers factorized."""

from torch import fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.transforms.base import Sequential
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.values.plan import Plan


def applied(plan: Plan, channels: ChannelGraph, weights: bool = True) -> fx.GraphModule:
    """The network of a plan; the original is left alone.

    Args:
        plan: What stays, and what is factorized.
        channels: The analysis of the original.
        weights: Whether factorized layers get their weights, or only their shapes, for weights that are loaded afterwards.

    Raises:
        PlanError: The plan does not fit.
    """
    return Sequential((RemoveChannels(plan, channels), FactorizeConv(plan.factors, weights)))(channels.graph).graph
