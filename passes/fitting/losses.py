"""What removing channels loses: for every group the order in which to keep its units, and the loss at every width.

The loss of a layer is counted behind its batch norm, where an error of each output has its weight, and summed over the layers that
read the group. To compare groups, a probe narrows each one alone, repairs its readers, and looks at what that does to
the network's outputs: their distance from the original's per unit of loss is the group's *sensitivity*.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, affine, beyond_repair, columns_of, readers_of
from compressor.passes.criteria import select
from compressor.passes.fitting.compensated_ranking import Ranking, Reading, rank
from compressor.passes.fitting.fit_layers import fit_on_statistics
from compressor.passes.fitting.jobs import jobs_of
from compressor.passes.fitting.settings import Compensation
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.layers.product import Product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics, collect, matrix_bytes
from compressor.passes.statistics.distances import Distance, default_distance, distance_between
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)

PROBE = 0.15  # of the loss that a group can cause: what a probe takes away, enough to be seen and small enough to be a slope


@dataclass(frozen=True)
class Curve:
    """Of one group.

    Attributes:
        ranking: Order and loss.
        sensitivity: Distance of the outputs from the original's per unit of loss; 1 where nothing was probed.
    """

    ranking: Ranking
    sensitivity: float = 1.0


def rankable(channels: ChannelGraph) -> tuple[dict[str, list[Reader]], dict[str, str]]:
    """Free groups with the layers that read them, in the order in which they are produced; and the others with the reason."""
    readers = readers_of(channels)
    odd = beyond_repair(channels)
    found: dict[str, list[Reader]] = {}
    left: dict[str, str] = {}
    for group in channels.free:
        own = [r for r in readers.values() if not _product(channels, r).depthwise and columns_of(r, group, channels)]
        stubborn = [layer for layer in group.readers if layer in odd]
        if stubborn:
            left[group.name] = f"`{stubborn[0]}` reads it and cannot be compensated: {odd[stubborn[0]]}"
        elif not own:
            left[group.name] = "no convolution and no linear layer reads it"
        else:
            found[group.name] = own
    return found, left


def loss_curves(
    channels: ChannelGraph,
    calibration: Calibration,
    settings: Compensation,
    probes: int = 256,
    seed: int = 0,
    distance: Distance | None = None,
    norms: bool = True,
) -> dict[str, Curve]:
    """Rank every free group whose readers can be compensated.

    Args:
        channels: The analysis of the network, in eval mode.
        calibration: Images.
        settings: Of compensation: images, positions, ridge and memory.
        probes: Images that sensitivities are measured on; 0 for none.
        seed: Of the sampled positions.
        distance: How the network's outputs are compared; by what they look like if None.
        norms: Whether errors are counted behind the batch norm of a layer.

    Raises:
        DataError: The features are not finite.
    """
    readers, left = rankable(channels)
    for name, reason in left.items():
        logger.info("loss curves: group %s is left alone: %s", name, reason)
    by_name = {group.name: group for group in channels.groups}
    own = distance or default_distance(channels.graph)
    probe = _Probe(channels, calibration.first(probes), settings, own) if probes else None
    curves = {}
    for name, statistics in statistics_by_group(channels, readers, calibration, settings, seed):
        group = by_name[name]
        ranking = rank(list(readings_of(channels, group, readers[name], statistics, norms)), group.size)
        curves[name] = Curve(ranking, probe(group, ranking, statistics) if probe else 1.0)
    return curves


def statistics_by_group(
    channels: ChannelGraph,
    readers: Mapping[str, Sequence[Reader]],
    calibration: Calibration,
    settings: Compensation,
    seed: int = 0,
) -> Iterator[tuple[str, dict[str, Statistics]]]:
    """Group after group with the statistics of its readers, as many groups per pass as the memory holds."""
    for names, memory in _portions(channels, readers, settings.memory_mb << 19):
        nodes = {reader.node for name in names for reader in readers[name]}
        order = [node for node in readers_of(channels) if node in nodes]
        found = collect(channels.graph, order, calibration.first(settings.images), settings.positions, memory, seed)
        for name in names:
            yield name, {reader.node: found[reader.node] for reader in readers[name]}


def _product(channels: ChannelGraph, reader: Reader) -> Product:
    return Product(channels.graph.get_submodule(reader.layer))


def _portions(channels: ChannelGraph, readers: Mapping[str, Sequence[Reader]], memory: int) -> Iterator[tuple[list[str], int]]:
    """Groups whose statistics fit into the memory together, and how much of it one layer may take."""
    names: list[str] = []
    used = 0
    for name, own in readers.items():
        size = sum(matrix_bytes(product, product.columns) // 4 for product in (_product(channels, r) for r in own))
        if names and used + size > memory:
            yield names, memory
            names, used = [], 0
        if size > memory:  # one group with so many readers, or so large ones, that each is cut into parts
            yield [name], memory // len(own)
        else:
            names.append(name)
            used += size
    if names:
        yield names, memory


def readings_of(
    channels: ChannelGraph, group: ChannelGroup, readers: Sequence[Reader], statistics: Mapping[str, Statistics], norms: bool
) -> Iterator[Reading]:
    """How the readers of a group read it; see `Reading`."""
    for reader in readers:
        product = _product(channels, reader)
        scale = affine(channels.graph, reader.norm if norms else None, product.outputs)[0].reshape(product.blocks, -1, 1)
        matrix = product.matrix() * scale
        for block, table in columns_of(reader, group, channels).items():
            for part in statistics[reader.node].parts:
                here = (table >= part.columns.start) & (table < part.columns.stop)
                if bool(here.any()):
                    columns = torch.where(here, table - part.columns.start, -1)
                    yield Reading(part.covariance[block], matrix[block][:, part.columns], columns)


class Divergences:
    """What changed networks do to the outputs: each is changed in one place, one after the other in the order of the graph.

    Args:
        graph: The network as it is.
        calibration: Images.
        memory_mb: For activations before they go to files.
        distance: How outputs are compared.
    """

    def __init__(self, graph: fx.GraphModule, calibration: Calibration, memory_mb: int, distance: Distance) -> None:
        self._graph, self._calibration, self._memory, self._distance = graph, calibration, memory_mb << 20, distance
        self._prefix = Prefix(graph, calibration, Shelf(self._memory))
        self._outputs = [distance.kept(output) for output in self._prefix.fork().finish()]

    def __call__(self, changed: fx.GraphModule, first: str) -> float:
        """Divergence of a network's outputs, of which `first` is the first node that gives something else."""
        if self._prefix.passed(first):
            self._prefix = Prefix(self._graph, self._calibration, Shelf(self._memory))
        self._prefix.before(first)
        found = [self._distance.kept(output) for output in self._prefix.fork(changed).finish()]
        return distance_between(self._distance, self._outputs, found)


def sensitivity(found: float, loss: float, largest: float) -> float:
    """Divergence per unit of loss; of a loss that is nothing beside the largest, as if it were a trace of that."""
    return found / max(loss, 1e-12 * largest)


class _Probe:
    """Measures sensitivities, one group after the other in the order of the graph."""

    def __init__(self, channels: ChannelGraph, calibration: Calibration, settings: Compensation, distance: Distance) -> None:
        self._channels, self._settings = channels, settings
        self._divergence = Divergences(channels.graph, calibration, settings.memory_mb, distance)

    def __call__(self, group: ChannelGroup, ranking: Ranking, statistics: Mapping[str, Statistics]) -> float:
        legal = np.arange(group.narrowest, group.size, group.granularity)
        if not len(legal) or ranking.loss[0] <= 0:
            return 0.0
        hurting = legal[ranking.loss[legal] >= PROBE * ranking.loss[0]]
        width = int(hurting.max()) if len(hurting) else int(legal.min())
        plan = Plan.keep({group.name: select(group, ranking.scores, width)}, self._channels.digest)
        narrowed = RemoveChannels(plan, self._channels)(self._channels.graph).graph.eval()
        for job in jobs_of(self._channels, self._channels.kept_masks(plan), narrowed):
            if job.loses and job.reader.node in statistics and job.product.blocks == job.whole.blocks:
                fit_on_statistics(narrowed, job, statistics[job.reader.node], self._settings)
        found = self._divergence(narrowed, _first_changed(self._channels.graph, narrowed))
        return sensitivity(found, float(ranking.loss[width]), float(ranking.loss[0]))


def _first_changed(graph: fx.GraphModule, narrowed: fx.GraphModule) -> str:
    """The first node that gives something else in the narrowed graph; parameters are fetched anew anyway."""
    for before, after in zip(graph.graph.nodes, narrowed.graph.nodes, strict=True):
        if before.op != "get_attr" and shapes_of(before) != shapes_of(after):
            return str(before.name)
    return str(before.name)
