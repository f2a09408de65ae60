"""The bottom-up search of CaP: binary structural search with step constraint.

Groups are decided in the order of the graph. The accuracy that is tolerated falls linearly from the original's to the floor,
by one step per group; within it, bisection finds how much of the group may go: the tail of the ranking is masked, its
readers are compensated, and the whole network is evaluated on the hold-out, from the activations in front of the first
reader on, which are computed once.

    step = (accuracy - floor) / groups;  tolerated = accuracy
    for each group:  tolerated -= step;  low, high = 0, most
        K times: middle = (low + high) / 2; mask, compensate; low = middle if accuracy >= tolerated else high = middle
        keep `low`, compensated

Channels are masked here, not removed, which gives the same outputs; so a reader's weights stay a matrix over all its
inputs, with zeros where nothing is read.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.data.batches import pair_of
from compressor.errors import DataError
from compressor.methods.base import Problem
from compressor.methods.structures.legal import widths
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, affine, columns_of, kept_channels, norm_of
from compressor.passes.criteria import select
from compressor.passes.fitting.fit import Job, Samples, chosen, jobs_of, solve_on_statistics, write
from compressor.passes.fitting.losses import rankable, readings_of, statistics_by_group
from compressor.passes.fitting.ranking import Ranking, Reading, rank
from compressor.passes.fitting.regression import Facts, pooled, solve_held_out
from compressor.passes.fitting.settings import Compensation
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.layers.product import Product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics, parts_of
from compressor.passes.statistics.original import Original
from compressor.passes.statistics.prefix import Prefix, Shelf
from compressor.passes.tracing.trace import outputs_of, quiet_deepcopy
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Holdout:
    """Labelled images that decisions rest on.

    Attributes:
        images: In batches.
        labels: Of each batch.
    """

    images: Calibration
    labels: tuple[Tensor, ...]


@dataclass(frozen=True)
class BottomUp:
    """The search; see the module.

    Attributes:
        problem: What is to be compressed.
        calibration: Images for the statistics.
        holdout: Labelled images.
        settings: Of compensation.
        steps: Bisection steps per group.
        most: The largest share of a group that goes.
        recollect: Whether statistics are those of the network as decided so far.
        groups: Names of the groups that may be pruned.
    """

    problem: Problem
    calibration: Calibration
    holdout: Holdout
    settings: Compensation
    steps: int
    most: float
    recollect: bool
    groups: tuple[str, ...]

    def accuracy(self) -> float:
        """Of the original on the hold-out, 0 to 1."""
        return _share_right(Prefix(self.problem.channels.graph, self.holdout.images, Shelf()), self.holdout)

    def run(self, floor: float) -> Plan:
        """Decide every group.

        Args:
            floor: Lowest tolerated accuracy, 0 to 1.
        """
        state = _State(self)
        accuracy = self.accuracy()
        tolerated, step = accuracy, (accuracy - floor) / max(len(self.groups), 1)
        for name in state.order():
            tolerated -= step
            width = state.decide(name, tolerated)
            self.problem.progress.stage(
                f"{name} keeps {width} of {state.by_name[name].size} (accuracy at least {100 * tolerated:.2f} %)"
            )
        return state.plan()


class _State:
    """The network as decided so far."""

    def __init__(self, search: BottomUp) -> None:
        self.search = search
        self.channels: ChannelGraph = search.problem.channels
        self.by_name = {group.name: group for group in self.channels.groups}
        readers, _ = rankable(self.channels)
        self.readers = {name: readers[name] for name in search.groups if name in readers}
        self.masks: list[NDArray[np.bool_]] = [np.ones(group.size, dtype=bool) for group in self.channels.groups]
        self.work = quiet_deepcopy(self.channels.graph).eval()
        self.jobs = {job.reader.node: job for job in jobs_of(self.channels, self.masks, self.work)}
        self.shelf = Shelf(search.settings.memory_mb << 20)
        self.judge = Prefix(self.work, search.holdout.images, self.shelf)
        self.refitted: set[str] = set()
        alone = self._alone if search.recollect else (lambda _: False)
        together = {name: own for name, own in self.readers.items() if not alone(name)}
        self._statistics = statistics_by_group(self.channels, together, search.calibration, search.settings, search.problem.seed)
        self._known: dict[str, dict[str, Statistics]] = {}
        if search.recollect:
            own = (search.settings.positions, search.problem.seed, self.shelf)
            self.original = Original(self.channels.graph, search.calibration, *own)
            self.own = Prefix(self.work, search.calibration, self.shelf)

    def order(self) -> list[str]:
        """Groups, by the first layer that reads them."""
        place = {node: k for k, node in enumerate(self.jobs)}
        return sorted(self.readers, key=lambda name: place[self.readers[name][0].node])

    def plan(self) -> Plan:
        kept = {
            group.name: np.flatnonzero(mask).tolist()
            for group, mask in zip(self.channels.groups, self.masks, strict=True)
            if not mask.all()
        }
        return Plan.keep(kept, self.channels.digest)

    def decide(self, name: str, tolerated: float) -> int:
        """Bisect the width of one group; returns it."""
        group, first = self.by_name[name], self.readers[name][0].node
        if self.search.recollect:
            self._refit_up_to(first)
        candidates = self._collected_anew(name) if self.search.recollect and self._alone(name) else self._as_published(name)
        legal = [w for w in widths(group, self.search.problem.target.align) if w >= group.size * (1 - self.search.most)]
        low, high = 0.0, self.search.most
        tried: dict[int, bool] = {group.size: True}
        best = group.size
        for _ in range(self.search.steps):
            middle = 0.5 * (low + high)
            width = min((w for w in legal if w >= group.size * (1 - middle)), default=group.size)
            if width not in tried:
                candidates.put(width)
                tried[width] = self._judged(first) >= tolerated
            low, high = (middle, high) if tried[width] else (low, middle)
            best = min(best, width) if tried[width] else best
        candidates.put(best)
        return best

    def put(self, group: ChannelGroup, kept: Sequence[int]) -> None:
        """Set the mask of a group."""
        mask = self.masks[self.channels.groups.index(group)]
        mask[:] = False
        mask[list(kept)] = True

    def store(self, reader: Reader, columns: Tensor, matrix: Tensor, bias: Tensor) -> None:
        """Weights over the columns that are read, zeros elsewhere; `bias` is what is added to the original's."""
        product = self.restore(reader)
        whole = torch.zeros_like(product.matrix())
        whole.scatter_(2, columns[:, None].expand(-1, whole.shape[1], -1), matrix)
        write(self.work, reader, product, whole, product.bias + bias.flatten())

    def restore(self, reader: Reader) -> Product:
        """Give a layer the original's weights again, and the norm behind it the original's mean."""
        module, original = (graph.get_submodule(reader.layer) for graph in (self.work, self.channels.graph))
        module.bias = None if original.bias is None else nn.Parameter(original.bias.detach().clone())  # type: ignore[operator]
        product = Product(module)
        product.write(Product(original).matrix(), None)
        norm, known = (norm_of(graph, reader.norm) for graph in (self.work, self.channels.graph))
        if norm is not None and known is not None and isinstance(norm.running_mean, Tensor):
            norm.running_mean.copy_(known.running_mean)  # type: ignore[arg-type]
        return product

    def columns(self, reader: Reader) -> Tensor:
        """(blocks, kept) columns that are still read."""
        whole = Product(self.channels.graph.get_submodule(reader.layer))
        if whole.depthwise:  # a block goes with its output, or stays whole
            return torch.arange(whole.kernel, device=whole.weight.device).expand(whole.blocks, -1)
        mask = kept_channels(reader.inputs, self.masks, self.channels, whole.inputs).repeat(whole.kernel).reshape(whole.blocks, -1)
        return torch.stack([torch.from_numpy(np.flatnonzero(own)) for own in mask]).to(whole.weight.device)

    def _judged(self, first: str) -> float:
        if self.judge.passed(first):
            self.judge = Prefix(self.work, self.search.holdout.images, self.shelf)
        self.judge.before(first)
        return _share_right(self.judge.fork(), self.search.holdout)

    def _alone(self, name: str) -> bool:
        """One reader, whose covariance fits into the memory: statistics can be collected anew right in front of it."""
        own = self.readers[name]
        product = Product(self.channels.graph.get_submodule(own[0].layer))
        return len(own) == 1 and product.blocks == 1 and len(parts_of(product, self.search.settings.memory_mb << 19)) == 1

    def _as_published(self, name: str) -> "_Published":
        while name not in self._known:
            found, statistics = next(self._statistics)
            self._known[found] = statistics
        statistics = self._known.pop(name)
        readings = list(readings_of(self.channels, self.by_name[name], self.readers[name], statistics, self.search.recollect))
        return _Published(self, name, rank(readings, self.by_name[name].size), statistics)

    def _moments(self, job: Job, columns: Tensor) -> list[tuple[Facts, int]]:
        """Of what a layer reads in the network as it is, and of what it should give."""
        self.original.through(job.reader)
        self.own.before(job.reader.node)
        samples = Samples(self.channels.graph, job, self.original, self.own, self.search.settings)
        return samples.facts(columns)

    def _collected_anew(self, name: str) -> "_CollectedAnew":
        job = self.jobs[self.readers[name][0].node]
        self.restore(job.reader)
        columns = torch.arange(job.whole.columns, device=job.whole.weight.device)[None]
        halves = self._moments(job, columns)
        facts = pooled(halves)
        scale = affine(self.channels.graph, job.reader.norm, job.whole.outputs)[0][:, None]
        table = columns_of(job.reader, self.by_name[name], self.channels)[0]
        reading = Reading(facts.covariance[0], job.whole.matrix()[0] * scale, table, facts.cross[0] * scale)
        self.refitted.add(job.reader.node)
        return _CollectedAnew(self, name, rank([reading], self.by_name[name].size), halves)

    def _refit_up_to(self, node: str) -> None:
        """Fit the layers in front of a node on what the network shows them, once something in front of them has gone."""
        for name, job in self.jobs.items():
            if name == node:
                return
            gone = not all(mask.all() for mask in self.masks)
            loses = self.columns(job.reader).shape[1] < job.whole.columns
            if name in self.refitted or not gone or not (loses or self.search.settings.layers == "all"):
                continue
            if self.own.passed(name):
                continue
            self.refitted.add(name)
            self.restore(job.reader)
            columns = self.columns(job.reader)
            self.fit(job.reader, columns, self._moments(job, columns))

    def fit(self, reader: Reader, columns: Tensor, halves: Sequence[tuple[Facts, int]]) -> None:
        """Fit a layer on moments of the columns that it still reads."""
        product, settings = self.restore(reader), self.search.settings
        weights = chosen(product.matrix(), columns)
        bias = product.bias.reshape(weights.shape[:2])
        found, _ = solve_held_out(halves, weights, bias, settings.ridges, settings.rescale)
        self.store(reader, columns, found.matrix, found.bias - bias)


class _Published:
    """Candidate widths of a group, compensated on statistics of the original network."""

    def __init__(self, state: _State, name: str, ranking: Ranking, statistics: Mapping[str, Statistics]) -> None:
        self._state, self._name, self._ranking, self._statistics = state, name, ranking, statistics

    def put(self, width: int) -> None:
        """Mask and compensate."""
        state, group = self._state, self._state.by_name[self._name]
        state.put(group, select(group, self._ranking.scores, width))
        for reader in state.readers[self._name]:
            whole = Product(state.channels.graph.get_submodule(reader.layer))
            columns = state.columns(reader)
            found = solve_on_statistics(self._statistics[reader.node], whole.matrix(), columns, state.search.settings)
            state.store(reader, columns, found.matrix, found.bias)


class _CollectedAnew:
    """Candidate widths of a group with one reader, fitted on what the network as decided so far shows it."""

    def __init__(self, state: _State, name: str, ranking: Ranking, halves: list[tuple[Facts, int]]) -> None:
        self._state, self._name, self._ranking, self._halves = state, name, ranking, halves

    def put(self, width: int) -> None:
        """Mask and fit."""
        state, group = self._state, self._state.by_name[self._name]
        state.put(group, select(group, self._ranking.scores, width))
        reader = state.readers[self._name][0]
        columns = state.columns(reader)
        state.fit(reader, columns, [(facts.kept(columns), count) for facts, count in self._halves])


def labelled(problem: Problem, images: int) -> Holdout:
    """The first images of the hold-out with their labels.

    Raises:
        DataError: There are none.
    """
    pairs = []
    for k, batch in enumerate(problem.validate):
        pairs.append(pair_of(batch, k))
        if sum(len(y) for _, y in pairs) >= images:
            break
    if not pairs:
        raise DataError("the bottom-up search looks at accuracies: pass labelled images of a hold-out as validate=…")
    inputs = Calibration.read([x for x, _ in pairs], problem.channels.graph, images, least=1)
    return Holdout(inputs, tuple(y[: len(own[0])] for (_, y), own in zip(pairs, inputs.batches, strict=True)))


def _share_right(prefix: Prefix, holdout: Holdout) -> float:
    right = count = 0
    for output, labels in zip(prefix.finish(), holdout.labels, strict=True):
        right += int((outputs_of(output)[0].argmax(1).cpu() == labels.cpu()).sum())
        count += len(labels)
    return right / count
