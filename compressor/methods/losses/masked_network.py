"""`Masked`: a network whose channels are masked group by group, compensated on statistics of the original, and judged at once.

Masked is removed, for the outputs; so a reader's weights stay a matrix over all its inputs, with zeros where nothing is read,
and a width can be tried without building a graph. The activations in front of a group's first reader are computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, kept_channels, norm_of
from compressor.passes.criteria import select
from compressor.passes.fitting.compensated_ranking import Ranking, rank
from compressor.passes.fitting.fit_layers import solve_on_statistics, write
from compressor.passes.fitting.jobs import jobs_of
from compressor.passes.fitting.losses import rankable, readings_of, statistics_by_group
from compressor.passes.fitting.settings import Compensation
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.layers.product import Product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.trace import DYNAMIC, device_of, quiet_deepcopy
from compressor.tasks.metric import Metric
from compressor.tasks.samples import Batches, Sample, first_samples
from compressor.training.evaluate import by_function, counted
from compressor.values.plan import Plan


@dataclass(frozen=True, eq=False)
class Holdout:
    """Images that decisions rest on, with what they are judged by.

    Attributes:
        images: In batches.
        samples: The same with the rest of each batch.
    """

    images: Calibration
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, channels: ChannelGraph, batches: Batches, images: int) -> "Holdout":
        """The first so many.

        Raises:
            DataError: There are none.
        """
        found = first_samples(batches, images, not channels.graph.meta[DYNAMIC])
        read = [own.inputs if own.around is None else own.around.inputs(own.inputs) for own in found]
        inputs = Calibration.read(read, channels.graph, sum(sample.count for sample in found), least=1)
        return cls(inputs, tuple(found))

    @property
    def metric(self) -> Metric:
        """What networks are judged by."""
        return self.samples[0].task.metric

    def value(self, network: Prefix, graph: fx.GraphModule) -> float:
        """The metric of a network.

        Args:
            network: Run as far as it has been.
            graph: The same network, for a metric that runs it itself.
        """
        metric = self.metric
        if metric.meter is None:
            return by_function(graph, self.samples)
        meter = metric.meter()
        with torch.no_grad():
            whole = any(sample.around is not None for sample in self.samples)
            outputs = (own.to(device_of(graph)).outputs(graph) for own in self.samples) if whole else network.finish()
            for sample, output in zip(self.samples, outputs, strict=True):
                counted(meter, sample.to(device_of(graph)), output)
        return metric.value(meter)


class Masked:
    """The network as masked so far; see the module.

    Args:
        channels: The analysis of the network.
        names: Groups that may be masked.
        calibration: Images for the statistics.
        holdout: What it is judged on.
        settings: Of compensation.
        seed: Of the sampled positions.
    """

    def __init__(
        self,
        channels: ChannelGraph,
        names: Sequence[str],
        calibration: Calibration,
        holdout: Holdout,
        settings: Compensation,
        seed: int,
    ) -> None:
        self._channels, self._holdout, self._settings = channels, holdout, settings
        self._groups = {group.name: k for k, group in enumerate(channels.groups)}
        ranked, _ = rankable(channels)
        self._readers = {name: ranked[name] for name in names}
        self._masks: list[NDArray[np.bool_]] = [np.ones(group.size, dtype=bool) for group in channels.groups]
        self.graph = quiet_deepcopy(channels.graph).eval()
        self._shelf = Shelf(settings.memory_mb << 20)
        self._judge = Prefix(self.graph, holdout.images, self._shelf)
        self._coming = statistics_by_group(channels, self._readers, calibration, settings, seed)
        self._known: dict[str, dict[str, Statistics]] = {}
        place = {job.reader.node: k for k, job in enumerate(jobs_of(channels, self._masks, self.graph))}
        self.order: list[str] = sorted(self._readers, key=lambda name: place[self._readers[name][0].node])

    @property
    def plan(self) -> Plan:
        """What is not masked."""
        pairs = zip(self._channels.groups, self._masks, strict=True)
        return Plan.keep({g.name: np.flatnonzero(mask).tolist() for g, mask in pairs if not mask.all()}, self._channels.digest)

    def group(self, name: str) -> ChannelGroup:
        """A group."""
        return self._channels.groups[self._groups[name]]

    def ranking(self, name: str) -> Ranking:
        """The order in which a group's units can be made up for, by all who read it."""
        readings = readings_of(self._channels, self.group(name), self._readers[name], self._statistics(name), norms=False)
        return rank(list(readings), self.group(name).size)

    def mask(self, name: str, ranking: Ranking, width: int) -> None:
        """Keep the first units of a ranking, and compensate those who read them."""
        mask = self._masks[self._groups[name]]
        mask[:] = False
        mask[list(select(self.group(name), ranking.scores, width))] = True
        for reader in self._readers[name]:
            whole, columns = Product(self._channels.graph.get_submodule(reader.layer)), self._columns(reader)
            found = solve_on_statistics(self._statistics(name)[reader.node], whole.matrix(), columns, self._settings)
            self._store(reader, columns, found.matrix, found.bias)

    def metric(self, name: str) -> float:
        """That of the network as masked, from the first reader of a group on."""
        first = self._readers[name][0].node
        if self._judge.passed(first):
            self._judge = Prefix(self.graph, self._holdout.images, self._shelf)
        self._judge.before(first)
        return self._holdout.value(self._judge.fork(), self.graph)

    def _statistics(self, name: str) -> dict[str, Statistics]:
        while name not in self._known:
            found, statistics = next(self._coming)
            self._known[found] = statistics
        return self._known[name]

    def done(self, name: str) -> None:
        """Let a group's statistics go."""
        del self._known[name]

    def _columns(self, reader: Reader) -> Tensor:
        """(blocks, kept) columns that are still read."""
        whole = Product(self._channels.graph.get_submodule(reader.layer))
        if whole.depthwise:  # a block goes with its output, or stays whole
            return torch.arange(whole.kernel, device=whole.weight.device).expand(whole.blocks, -1)
        read = kept_channels(reader.inputs, self._masks, self._channels, whole.inputs)
        mask = read.repeat(whole.kernel).reshape(whole.blocks, -1)
        return torch.stack([torch.from_numpy(np.flatnonzero(own)) for own in mask]).to(whole.weight.device)

    def _store(self, reader: Reader, columns: Tensor, matrix: Tensor, bias: Tensor) -> None:
        """Weights over the columns that are read, zeros elsewhere; `bias` is what is added to the original's."""
        product = self._restored(reader)
        whole = torch.zeros_like(product.matrix())
        whole.scatter_(2, columns[:, None].expand(-1, whole.shape[1], -1), matrix)
        write(self.graph, reader, product, whole, product.bias + bias.flatten())

    def _restored(self, reader: Reader) -> Product:
        """A layer with the original's weights again, and the norm behind it with the original's mean."""
        module, original = (graph.get_submodule(reader.layer) for graph in (self.graph, self._channels.graph))
        module.bias = None if original.bias is None else nn.Parameter(original.bias.detach().clone())  # type: ignore[operator]
        product = Product(module)
        product.write(Product(original).matrix(), None)
        norm, known = (norm_of(graph, reader.norm) for graph in (self.graph, self._channels.graph))
        if norm is not None and known is not None and isinstance(norm.running_mean, Tensor):
            norm.running_mean.copy_(known.running_mean)  # type: ignore[arg-type]
        return product
