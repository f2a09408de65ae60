"""What removing branches loses: every one alone, with the layers around it repaired, in the units of channels and ranks.

    loss          E||y - y'||² of the sum that the branch was a part of, summed over channels
    sensitivity   divergence of the outputs per unit of that

The layer in front that makes the shortcut takes over what it can of the branch, those behind it what is left; layers farther on
stay as they are, so that a branch is judged in seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.branches import Branch
from compressor.passes.channels.search_space import BranchAxis
from compressor.passes.fitting.compensated_ranking import Ranking
from compressor.passes.fitting.fit_layers import fit_side_by_side
from compressor.passes.fitting.jobs import jobs_behind, jobs_of
from compressor.passes.fitting.losses import Curve
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import Distance, default_distance, distance_between
from compressor.passes.statistics.original_outputs import Remembered
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.modes import full_float32
from compressor.passes.transforms.remove_branches import rewiring
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.values.plan import Plan

_REPAIRED = 4  # layers: the one in front, and those of the next branch with one to spare
_IMAGES, _POSITIONS, _RIDGE = 512, 12, 1e-4  # of these repairs


def branch_curves(
    channels: ChannelGraph,
    axes: Sequence[BranchAxis],
    calibration: Calibration,
    settings: Compensation,
    probes: int = 256,
    seed: int = 0,
    distance: Distance | None = None,
) -> dict[str, Curve]:
    """Loss and sensitivity of every branch.

    Args:
        channels: The analysis of the network, in eval mode.
        axes: Of the branches, in the order of the graph.
        calibration: Images; the last of them are what the outputs are looked at on.
        settings: Of compensation: images, positions and memory.
        probes: How many these are.
        seed: Of the sampled positions.
        distance: How the network's outputs are compared; by what they look like if None.

    Returns:
        Name of each axis -> its curve: the loss without the branch, and none with it.
    """
    if not axes:
        return {}
    seen = calibration.after(max(calibration.images - probes, calibration.images // 2))
    settings = replace(settings, images=min(settings.images, _IMAGES), positions=min(settings.positions, _POSITIONS), ridge=_RIDGE)
    used = calibration.first(min(settings.images, calibration.images - seen.images))
    probe = _Probe(channels, used, seen, settings, seed, distance or default_distance(channels.graph))
    return {axis.name: probe(axis.branch) for axis in axes}


class _Probe:
    """Removes one branch at a time, in the order of the graph."""

    def __init__(
        self, channels: ChannelGraph, used: Calibration, seen: Calibration, settings: Compensation, seed: int, distance: Distance
    ) -> None:
        self._distance = distance
        self._channels, self._used, self._seen, self._settings, self._seed = channels, used, seen, settings, seed
        self._place = {node.name: k for k, node in enumerate(channels.graph.graph.nodes)}
        with full_float32():
            self._shown = Remembered(channels, used, settings.positions, seed, settings.memory_mb)
            self._fitted, self._watched = self._begin(used), self._begin(seen)
            self._outputs = [distance.kept(output) for output in self._begin(seen).finish()]

    def _begin(self, images: Calibration) -> Prefix:
        return Prefix(self._channels.graph, images, Shelf(self._settings.memory_mb << 20))

    def __call__(self, branch: Branch) -> Curve:
        """Two points: without the branch, and with it."""
        plan = Plan.keep({}, self._channels.digest, removed=[branch.name])
        graph = RemoveChannels(plan, self._channels)(self._channels.graph).graph.eval()
        jobs = jobs_behind(self._channels, plan, jobs_of(self._channels, self._channels.kept_masks(plan), graph, plan))
        first = min((self._place[job.reader.node] for job in jobs), default=self._place[branch.nodes[0]])
        start = list(self._place)[min(first, self._place[branch.nodes[0]], self._place[branch.at])]
        with full_float32():
            own = self._forked("_fitted", self._used, start, graph)
            images, settings = self._used, self._settings
            fit_side_by_side(self._channels, graph, jobs[:_REPAIRED], images, settings, self._seed, self._shown, own)
            watched = self._forked("_watched", self._seen, start, graph)
            loss = self._error(branch, watched)
            outputs = [self._distance.kept(output) for output in watched.finish()]
            found = distance_between(self._distance, self._outputs, outputs)
        ranking = Ranking(np.zeros(1, dtype=np.int64), np.array([loss, 0.0]))
        return Curve(ranking, found / max(loss, 1e-12))

    def _forked(self, name: str, images: Calibration, start: str, graph: fx.GraphModule) -> Prefix:
        """The original run up to a node, to be gone on with as another graph."""
        if getattr(self, name).passed(start):
            setattr(self, name, self._begin(images))
        prefix: Prefix = getattr(self, name)
        prefix.before(start)
        return prefix.fork(graph)

    def _error(self, branch: Branch, watched: Prefix) -> float:
        """Mean squared error of the sum, added up over channels: over positions and images."""
        wired = rewiring(self._channels.graph.graph, [branch])
        left = wired.instead[branch.at]
        target = wired.means.get(left, branch.at)
        original = self._watched.fork()
        original.through(target)
        watched.through(left)
        (value,) = self._channels.walk.values[target]
        channels = math.prod(value.shape[axis] for axis in value.axes) if value.axes else value.shape[1]
        pairs = [(original.value(target, k), watched.value(left, k)) for k in range(len(watched))]
        total = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        return float(channels * total / sum(a.numel() for a, _ in pairs))
