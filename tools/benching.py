"""What benchmarks of several methods share."""

from collections.abc import Mapping
from statistics import median

import torch
from torch.fx import GraphModule

import compressor
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.runtime.measuring.measure import Comparison, measure
from compressor.training.evaluate import recalibrate
from compressor.values.plan import Plan
from compressor.values.target import Target
from compressor.values.trial import Trial

SESSIONS = 3  # engines built anew; the median of their ratios is reported


def repaired(
    channels: ChannelGraph, plan: Plan, calibration: Calibration, compensation: Compensation | None, seed: int = 0
) -> GraphModule:
    """The network of a plan: compensated, batch norms recalibrated where that is asked or nothing else is done."""
    graph = RemoveChannels(plan, channels)(channels.graph).graph.eval()
    if compensation is not None:
        graph = Compensate(channels, plan, calibration, compensation, seed).run(graph).graph
    graph = FactorizeConv(plan.factors)(graph).graph.eval()
    if compensation is None:
        pairs = [(batch[0], batch[0]) for batch in calibration.batches]
        recalibrate(graph, pairs, len(pairs))
    return graph


def channels_last(graph: GraphModule) -> GraphModule:
    """A copy in the layout that a CPU trains 1.3 and evaluates 2 times as fast."""
    return quiet_deepcopy(graph).to(memory_format=torch.channels_last)


def measured_in(comparison: Comparison, channels: ChannelGraph, plan: Plan) -> Trial:
    """A plan's network, built and timed beside the original."""
    found, original = comparison.measure(compressor.apply(plan, channels.graph))
    return Trial(channels.structure(plan), found, original)


def timed_together(graphs: Mapping[str, GraphModule], target: Target) -> dict[str, dict[str, object]]:
    """What rows say of latencies, by name: networks beside each other and the `original`, so that what befalls one befalls all."""
    sessions = [measure(graphs, target, seed) for seed in range(1, 1 + SESSIONS)]
    said = {name: str(value) for name, value in sessions[0]["original"].target.items()}
    found = dict[str, dict[str, object]]()
    for name in graphs:
        ratios = [session[name].ratio_to(session["original"]) for session in sessions]
        found[name] = {"target": said, "latency_ratio": round(median(ratios), 4), "latency_ratios": [round(r, 4) for r in ratios]}
    return found
