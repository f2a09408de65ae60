"""Staircases: at which widths the latency of a layer really falls on a target.

Devices compute channels in blocks (vector registers, tensor cores, tiles), so a latency is a staircase over the width, and
on some a width off the step is *slower* than the wider one on it. Only the right edges of the steps are worth a
search's time: the widths that no wider one beats.

What is timed is the group's own piece of the network: the layer that makes its channels, what works on them channel by
channel, and the first layer that reads them. Widths are sampled coarsely and bisected wherever two neighbours differ by
more than the noise, until the edges are known to the channel, or to the next legal width.
"""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import fx, nn

from compressor.errors import BackendError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.tracing.trace import trace
from compressor.runtime.measuring.measure import built, clocks_of
from compressor.runtime.onnx.templates import Lowering
from compressor.runtime.timing.protocol import Protocol, time_together
from compressor.values.measurement import Measurement, contest
from compressor.values.progress import Progress
from compressor.values.target import Target

logger = logging.getLogger(__name__)

_ROUND = 8  # engines alive at once
FINE = Protocol(half_width=0.004, max_samples=1000, max_s=6.0)


@dataclass(frozen=True)
class Staircase:
    """Latency over the width of one group.

    Attributes:
        group: Name of the group.
        layers: What was timed.
        widths: Measured widths, ascending.
        ms: Their latencies.
        edges: Right edges: widths that no wider one beats; the last is the whole group.
        target: Fingerprint of the target.
    """

    group: str
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    edges: tuple[int, ...]
    target: dict[str, object]


def measure_staircase(
    channels: ChannelGraph,
    group: ChannelGroup,
    target: Target,
    protocol: Protocol | None = None,
    seed: int = 0,
    most: int = 72,
    progress: Progress | None = None,
    legal: Sequence[int] | None = None,
) -> Staircase:
    """Measure the staircase of a group.

    Args:
        channels: The analysis of the network.
        group: A free group.
        target: Where.
        protocol: Of the timing; finer than that of a search by default.
        seed: Of inputs and order.
        most: Widths that are measured at most.
        progress: Where to say how far it is.
        legal: Widths that matter, ascending, the whole group last; all of them by default.

    Raises:
        BackendError: No convolution makes and reads the group, or an engine cannot be built.
    """
    layers = piece_of(channels, group)
    found: dict[int, tuple[float, float]] = {}  # width -> latency and half of its interval, relative to the whole group's
    anchor: list[float] = []

    def time(widths: Sequence[int]) -> None:
        measured = _timed(channels, layers, group, widths, target, protocol or FINE, seed)
        whole = measured[group.size]
        anchor.append(whole.median_ms)
        for width in widths:
            # A session's ratio to the whole group is sharper than two latencies of different sessions.
            ratio = contest(measured[width], whole)
            off = (ratio.interval[1] - ratio.interval[0]) / 2 if width != group.size else 0.0
            found[width] = ratio.ratio, max(off, 1e-3)

    legal = legal or range(group.granularity, group.size + 1, group.granularity)
    waiting = sorted({legal[max(round(len(legal) * k / 8), 1) - 1] for k in range(1, 9)} | {legal[0]})
    while waiting and len(found) < most:
        for k in range(0, len(waiting), _ROUND):
            time(waiting[k : k + _ROUND])
            if progress:
                progress.tick(len(found), None, f"{group.name}: widths measured")
        waiting = _between(found, legal)[: most - len(found)]
    widths = tuple(sorted(found))
    scale = sum(anchor) / len(anchor)
    edges = tuple(w for w in widths if w == group.size or all(_below(found[w], found[v]) for v in widths if v > w))
    return Staircase(group.name, layers, widths, tuple(found[w][0] * scale for w in widths), edges, target.fingerprint())


def _below(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one latency is lower than another by more than their intervals (which hold with 95 %) allow for."""
    return other[0] - one[0] > max(1.5 * math.hypot(one[1], other[1]), 0.004)


def _between(found: dict[int, tuple[float, float]], legal: Sequence[int]) -> list[int]:
    """The middle of every two neighbours that differ and have a legal width between them."""
    at = {width: k for k, width in enumerate(legal)}
    middles = []
    for low, high in itertools.pairwise(sorted(found)):
        differ = _below(found[low], found[high]) or _below(found[high], found[low])
        if at[high] - at[low] > 1 and differ:
            middles.append(legal[(at[low] + at[high]) // 2])
    return middles


def piece_of(channels: ChannelGraph, group: ChannelGroup) -> tuple[str, ...]:
    """The layers that are timed: the first that makes the channels, those that work on each alone, the first that reads them.

    Raises:
        BackendError: No convolution makes and reads the group.
    """
    modules = dict(channels.graph.named_modules())
    order = [str(n.target) for n in channels.graph.graph.nodes if n.op == "call_module"]

    def is_conv(name: str, depthwise: bool) -> bool:
        module = modules.get(name)
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return False
        return depthwise is (module.groups == module.in_channels and module.groups > 1)

    makers = [name for name in order if name in group.layers and is_conv(name, depthwise=False)]
    readers = [name for name in order if name in group.readers and is_conv(name, depthwise=False) and name not in makers[:1]]
    if not makers or not readers:
        raise BackendError(f"group `{group.name}` has no staircase: no plain convolution makes it and another one reads it")
    alone = [name for name in order if name in group.layers and is_conv(name, depthwise=True)]
    between = [name for name in alone if order.index(makers[0]) < order.index(name) < order.index(readers[0])]
    return (makers[0], *dict.fromkeys(between), readers[0])


def _timed(
    channels: ChannelGraph,
    layers: Sequence[str],
    group: ChannelGroup,
    widths: Sequence[int],
    target: Target,
    protocol: Protocol,
    seed: int,
) -> dict[int, Measurement]:
    everyone = list(dict.fromkeys([*widths, group.size]))
    build = _builder(channels, layers, group)
    lowering = Lowering()
    with ExitStack() as stack:
        timers = {str(w): built(stack, build(w), target, seed, lowering).timer() for w in everyone}
        found = time_together(timers, target.fingerprint(), seed, protocol, clocks=clocks_of(target))
    return {width: found[str(width)] for width in everyone}


def _builder(channels: ChannelGraph, layers: Sequence[str], group: ChannelGroup) -> Callable[[int], fx.GraphModule]:
    """Makes the group's piece of the network at a width."""
    first = next(n for n in channels.graph.graph.nodes if n.op == "call_module" and n.target == layers[0])
    (shape,) = shapes_of(first.args[0])[:1]
    whole = [channels.graph.get_submodule(name) for name in layers]

    def build(width: int) -> fx.GraphModule:
        made = width * group.channels_per_unit
        chain: list[nn.Module] = [_resized(whole[0], None, made), nn.ReLU()]
        for module in whole[1:-1]:
            chain += [_resized(module, made, made), nn.ReLU()]
        chain.append(_resized(whole[-1], made, None))
        network = nn.Sequential(*chain).eval()
        return trace(network, (torch.randn(1, *shape[1:]),))

    return build


def _resized(module: nn.Module, reads: int | None, makes: int | None) -> nn.Module:
    """A convolution like this one with other channels, its weights random."""
    conv = copy.deepcopy(module)
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    depthwise = conv.groups == conv.in_channels > 1
    conv.in_channels, conv.out_channels = reads or conv.in_channels, makes or conv.out_channels
    if depthwise:
        conv.groups = conv.in_channels
    if conv.in_channels % conv.groups or conv.out_channels % conv.groups:
        raise BackendError("a grouped convolution has no staircase at this width")
    generator = torch.Generator().manual_seed(0)
    size = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    conv.weight = nn.Parameter(torch.randn(size, generator=generator) / (size[1] * conv.kernel_size[0] ** 2) ** 0.5)
    conv.bias = nn.Parameter(torch.randn(conv.out_channels, generator=generator))
    return conv
