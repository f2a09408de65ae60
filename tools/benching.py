"""What benchmarks of several methods share."""

import torch
from torch.fx import GraphModule

import compressor
from compressor.evaluate import recalibrate
from compressor.passes.calibration import Calibration
from compressor.passes.channels import ChannelGraph
from compressor.passes.compensate import Compensate
from compressor.passes.compensation import Compensation
from compressor.passes.factorize_conv import FactorizeConv
from compressor.passes.remove_channels import RemoveChannels
from compressor.passes.trace import quiet_deepcopy
from compressor.plan import Plan
from compressor.runtime.latency import Comparison
from compressor.trial import Trial


def repaired(
    channels: ChannelGraph, plan: Plan, calibration: Calibration, compensation: Compensation | None, seed: int = 0
) -> GraphModule:
    """The network of a plan: compensated, batch norms recalibrated where that is asked or nothing else is done."""
    graph = RemoveChannels(plan, channels)(channels.graph).graph.eval()
    if compensation is not None:
        graph = Compensate(channels, plan, calibration, compensation, seed).run(graph).graph
    graph = FactorizeConv(plan.factors)(graph).graph.eval()
    if compensation is None or compensation.recalibrate:
        pairs = [(batch[0], batch[0]) for batch in calibration.batches]
        recalibrate(graph, pairs, len(pairs))
    return graph


def channels_last(graph: GraphModule) -> GraphModule:
    """A copy in the layout that a CPU trains 1.3 and evaluates 2 times as fast."""
    return quiet_deepcopy(graph).to(memory_format=torch.channels_last)


def measured_in(comparison: Comparison, channels: ChannelGraph, plan: Plan) -> Trial:
    """A plan's network, built and timed beside the original."""
    found, original = comparison.measure(compressor.apply(plan, channels.graph, channels=channels))
    return Trial(channels.structure(plan), found, original)
