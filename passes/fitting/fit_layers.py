"""Fitting the layers of a narrowed network to what the original gives: the work behind `Compensate`, which explains it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from compressor.errors import PassError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, affine, inputs_read, kept_channels, norm_of, readers_of
from compressor.passes.fitting.rank_reduction import reduced
from compressor.passes.fitting.regression import Facts, Solution, error_of, pooled, solve, solve_held_out
from compressor.passes.fitting.settings import Compensation, Repair
from compressor.passes.layers.factorizable import sizes_of
from compressor.passes.layers.forms import Stage
from compressor.passes.layers.product import Product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics, check_finite, collect, parts_of
from compressor.passes.statistics.moments import Moments
from compressor.passes.statistics.original_outputs import Original
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.transforms.factorize_conv import STAGES
from compressor.values.plan import Factorization, Plan

_NEGLIGIBLE = 1e-3  # of the largest scale of a norm: an output scaled by less cannot make up for a shortcut


@dataclass(frozen=True, eq=False)
class Job:
    """A layer to be fitted.

    Attributes:
        reader: The layer, and what stands behind it.
        source: Node that it reads.
        whole: It in the original network.
        product: It in the narrowed one.
        rows: (kept outputs,): which outputs stay.
        columns: (blocks, kept columns): which columns of each block stay, where blocks do not go as a whole.
        loses: Whether it lost inputs.
        factorization: What it becomes afterwards: its new weight is one that this writes exactly.
    """

    reader: Reader
    source: str
    whole: Product
    product: Product
    rows: Tensor
    columns: Tensor
    loses: bool
    factorization: Factorization | None = None

    @property
    def changes(self) -> bool:
        """Whether the plan does something to it."""
        return self.loses or self.factorization is not None

    def reduced(self, graph: fx.GraphModule, matrix: Tensor, covariance: Tensor | None) -> Tensor:
        """The nearest weight, by what it makes of features with this covariance, that the factorization can write.

        How it writes it is noted at the layer's node.
        """
        if self.factorization is None:
            return matrix
        scale = affine(graph, self.reader.norm, self.product.outputs)[0].reshape(matrix.shape[:2])
        found = reduced(matrix, sizes_of(self.product.module), self.factorization, covariance, scale)
        node = next(node for node in graph.graph.nodes if node.name == self.reader.node)
        node.meta[STAGES] = _as_stored(found.stages) if self.product.transposed and found.stages else found.stages
        return found.matrix


def _as_stored(stages: Sequence[Sequence[Stage]]) -> list[list[Stage]]:
    """Sequences of a transposed convolution, whose kernel runs the other way in its matrix; see `Product.matrix`."""
    return [[replace(one, weight=np.flip(one.weight, tuple(range(2, one.weight.ndim)))) for one in own] for own in stages]


def jobs_of(
    channels: ChannelGraph, masks: Sequence[NDArray[np.bool_]], narrowed: fx.GraphModule, plan: Plan | None = None
) -> list[Job]:
    """Every layer of the narrowed network that can be fitted, in the order of the graph.

    Args:
        channels: The analysis of the original network.
        masks: What stays of each group.
        narrowed: The narrowed network.
        plan: It was narrowed by, where layers read a part of a stream or are factorized.
    """
    factors = {one.layer: one for one in plan.factors} if plan is not None else {}
    reads = inputs_read(channels, plan, masks) if plan is not None else {}
    nodes = {node.name: node for node in narrowed.graph.nodes}
    jobs = []
    for reader in readers_of(channels).values():
        if reader.node not in nodes:
            continue
        whole, product = Product(channels.graph.get_submodule(reader.layer)), Product(narrowed.get_submodule(reader.layer))
        inputs = reads.get(reader.node, kept_channels(reader.inputs, masks, channels, whole.inputs))
        rows = torch.from_numpy(np.flatnonzero(kept_channels(reader.outputs, masks, channels, whole.outputs)))
        device = product.weight.device
        stays = inputs.repeat(whole.kernel).reshape(whole.blocks, -1)
        columns = [torch.from_numpy(np.flatnonzero(own)) for own in stays if own.any()]  # a depthwise block goes as a whole
        if product.outputs != len(rows) or {len(own) for own in columns} != {product.columns}:
            raise PassError(
                f"`{reader.layer}` has {product.outputs} outputs and {product.columns} columns, the plan leaves {len(rows)} and "
                f"{len(columns[0]) if columns else 0}; this is not the original network narrowed by this plan"
            )
        node = nodes[reader.node]
        source, loses = node.all_input_nodes[0].name, not inputs.all()
        kept = torch.stack(columns).to(device)
        jobs.append(Job(reader, source, whole, product, rows.to(device), kept, loses, factors.get(reader.layer)))
    return jobs


def fit_on_original(
    channels: ChannelGraph,
    narrowed: fx.GraphModule,
    jobs: Sequence[Job],
    calibration: Calibration,
    settings: Compensation,
    seed: int,
) -> list[Repair]:
    """Fit layers on what the original network shows them, all in one pass; `narrowed` is changed in place."""
    own = [job for job in jobs if job.product.blocks == job.whole.blocks]  # whole blocks that go take their outputs along
    names, memory = [job.reader.node for job in own], settings.memory_mb << 19
    found = collect(channels.graph, names, calibration, settings.positions, memory, seed)
    return [fit_on_statistics(narrowed, job, found[job.reader.node], settings) for job in own]


def fit_on_statistics(narrowed: fx.GraphModule, job: Job, statistics: Statistics, settings: Compensation) -> Repair:
    """Fit one layer on statistics of the original network; `narrowed` is changed in place."""
    rows = job.rows.reshape(job.product.blocks, -1) % (job.whole.outputs // job.whole.blocks)
    matrix = torch.stack([own[index] for own, index in zip(job.whole.matrix(), rows, strict=True)])
    found = solve_on_statistics(statistics, matrix, job.columns, settings)
    if job.factorization is not None:
        found = _reduced_fit(narrowed, job, statistics, matrix, found)
    write(narrowed, job.reader, job.product, found.matrix, job.product.bias + found.bias.flatten())
    return Repair(job.reader.layer, found.before, found.after, statistics.samples, len(statistics.parts), found.ridge)


def _reduced_fit(narrowed: fx.GraphModule, job: Job, statistics: Statistics, whole: Tensor, fit: "Fit") -> "Fit":
    """The same with a matrix that can be factorized, and the mean of the output put right."""
    if len(statistics.parts) > 1:  # how the parts vary together is not known: the error of the weights has to do
        return replace(fit, matrix=job.reduced(narrowed, fit.matrix, None))
    (part,) = statistics.parts
    facts = Facts.of_layer(part.mean, part.covariance, whole, whole.new_zeros(whole.shape[:2])).kept(job.columns)
    matrix = job.reduced(narrowed, fit.matrix, facts.covariance)
    bias = facts.target_mean - (matrix @ facts.mean[:, :, None])[:, :, 0]
    after = float(error_of(facts, matrix, bias).sum()) / max(float(facts.target_variance.sum()), 1e-300)
    return replace(fit, matrix=matrix, bias=bias, after=after)


@dataclass(frozen=True)
class Fit:
    """New weights of a layer.

    Attributes:
        matrix: (blocks, outputs per block, kept columns).
        bias: (blocks, outputs per block): to be added to the bias that was there.
        before: Error with the old weights, as a share of the variance of the outputs.
        after: Error with the new ones.
        ridge: The ridge that was needed.
    """

    matrix: Tensor
    bias: Tensor
    before: float
    after: float
    ridge: float


def chosen(matrix: Tensor, columns: Tensor) -> Tensor:
    """(blocks, outputs, kept): the columns (blocks, kept) of a matrix (blocks, outputs, all)."""
    return matrix.gather(2, columns[:, None].expand(-1, matrix.shape[1], -1))


def solve_on_statistics(statistics: Statistics, matrix: Tensor, columns: Tensor, settings: Compensation) -> Fit:
    """The closed form where the target is what the layer makes of all its inputs.

    Args:
        statistics: Of all inputs.
        matrix: (blocks, outputs per block, all columns).
        columns: (blocks, kept columns).
        settings: Ridge and rescaling.
    """
    bias = nothing = matrix.new_zeros(matrix.shape[:2])
    solutions, variance = [], 0.0
    for part in statistics.parts:
        weights = matrix[:, :, part.columns]
        facts = Facts.of_layer(part.mean, part.covariance, weights, nothing)
        here = (columns[0] >= part.columns.start) & (columns[0] < part.columns.stop)  # several parts: one block
        kept = columns[:, here] - part.columns.start
        solutions.append(solve(facts.kept(kept), chosen(weights, kept), nothing, settings.ridges[0], settings.rescale))
        bias = bias + solutions[-1].bias
        variance += float(facts.target_variance.sum())
    before, after = (sum(float(getattr(s, name).sum()) for s in solutions) / max(variance, 1e-300) for name in ("before", "after"))
    return Fit(torch.cat([s.matrix for s in solutions], dim=2), bias, before, after, max(s.ridge for s in solutions))


def fit_side_by_side(
    channels: ChannelGraph,
    narrowed: fx.GraphModule,
    jobs: Sequence[Job],
    calibration: Calibration,
    settings: Compensation,
    seed: int,
    original: Original | None = None,
) -> list[Repair]:
    """Fit layer after layer on what the network as repaired so far shows it; `narrowed` is changed in place."""
    shelf = Shelf(settings.memory_mb << 20)
    original = original or Original(channels.graph, calibration, settings.positions, seed, shelf)
    own = Prefix(narrowed, calibration, shelf)
    repairs: list[Repair] = []
    for job in jobs:
        original.through(job.reader)
        own.before(job.reader.node)
        repairs.append(_fit(channels.graph, job, original, own, settings))
    return repairs


def _fit(graph: fx.GraphModule, job: Job, original: Original, own: Prefix, settings: Compensation) -> Repair:
    samples = Samples(graph, job, original, own, settings)
    matrix = job.product.matrix()
    bias = job.product.bias.reshape(matrix.shape[:2])
    solutions: list[Solution] = []
    count, variance, held_out = 0, 0.0, 0.0
    parts = parts_of(job.product, settings.memory_mb << 19)
    for part in parts:  # block coordinate descent: each part makes up for what the others leave
        rest = matrix.clone()
        rest[:, :, part] = 0
        halves = samples.facts(part, rest if len(parts) > 1 else None)
        solution, held_out = solve_held_out(halves, matrix[:, :, part], bias, settings.ridges, settings.rescale)
        solutions.append(solution)
        matrix[:, :, part], bias = solution.matrix, solution.bias
        count, variance = sum(n for _, n in halves), variance or float(pooled(halves).target_variance.sum())
    before, after = (float(error.sum()) / max(variance, 1e-300) for error in (solutions[0].before, solutions[-1].after))
    if job.factorization is not None:
        facts = pooled(halves) if len(parts) == 1 else None
        matrix = job.reduced(own.graph, matrix, None if facts is None else facts.covariance)
        if facts is not None:
            bias = facts.target_mean - (matrix @ facts.mean[:, :, None])[:, :, 0]
            after = float(error_of(facts, matrix, bias).sum()) / max(variance, 1e-300)
    write(own.graph, job.reader, job.product, matrix, bias.flatten())
    held_out /= max(variance, 1e-300)
    return Repair(job.reader.layer, before, after, count, len(parts), max(s.ridge for s in solutions), held_out)


class Samples:
    """What a layer of the narrowed network reads and what it should give, batch by batch."""

    def __init__(self, graph: fx.GraphModule, job: Job, original: Original, own: Prefix, settings: Compensation) -> None:
        self._job, self._original, self._own = job, original, own
        self._memory = settings.memory_mb << 19
        norm, shortcut = job.reader.norm, job.reader.shortcut
        self._wanted = tuple(own[job.rows] for own in affine(graph, norm, job.whole.outputs))
        self._scale, self._shift = affine(own.graph, norm, len(job.rows))
        self._sure = self._scale.abs() > _NEGLIGIBLE * self._scale.abs().max()
        self._shortcut = shortcut if shortcut is not None and own.has(shortcut) else None

    def facts(self, columns: slice | Tensor, rest: Tensor | None = None) -> list[tuple[Facts, int]]:
        """Of every second image, and of the others, with the number of samples of each.

        Args:
            columns: Which columns: a range, or (blocks, columns) indices.
            rest: (blocks, outputs per block, all columns): what other columns give, which is taken off the target.
        """
        halves = [Moments(), Moments()]
        image = 0
        for batch in range(len(self._own)):
            for x, y in self._portions(batch):  # (images, positions, blocks, …)
                if rest is not None:
                    y = y - torch.einsum("npgd,god->npgo", x.double(), rest)
                x = x[..., columns] if isinstance(columns, slice) else x.gather(3, columns.expand(*x.shape[:2], -1, -1))
                for parity, moments in enumerate(halves):
                    first = (parity + image) % 2
                    moments.add(x[first::2].flatten(0, 1), y[first::2].flatten(0, 1))
                image += len(x)
        found = [(Facts(m.mean, m.covariance, m.target_mean, m.target_variance, m.cross), m.count) for m in halves if m.count]
        return found if len(found) == 2 else [found[0], (found[0][0], 0)]  # one image along this axis: nothing to hold out

    def _portions(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches (images, positions, blocks, columns) and targets (images, positions, blocks, outputs), some images at a time."""
        job = self._job
        shown = self._original.shown(job.reader, batch)
        at = shown.at
        x = self._own.value(job.source, batch)
        check_finite(x, batch, f"input of `{job.reader.layer}`")
        y = shown.output[:, job.rows].double()
        check_finite(y, batch, f"output of `{job.reader.layer}` of the original")
        want = self._wanted[0] * y + self._wanted[1]
        if self._shortcut is not None and shown.shortcut is not None:
            want += shown.shortcut[:, job.rows].double() - job.product.values(self._own.value(self._shortcut, batch), at).double()
        y = torch.where(self._sure, (want - self._shift) / self._scale, y)  # through the norm, backwards
        targets = y.reshape(len(x), len(at), job.product.blocks, -1)
        size = job.product.portion(len(at), self._memory)
        for images, own in zip(torch.split(x, size), torch.split(targets, size), strict=True):
            yield job.product.patches(images, at).view(len(images), len(at), job.product.blocks, -1), own


def write(graph: fx.GraphModule, reader: Reader, product: Product, matrix: Tensor, bias: Tensor) -> None:
    """Store weights and bias (outputs,); a batch norm behind a layer without a bias takes it, so that no parameter is added."""
    norm = norm_of(graph, reader.norm)
    if norm is None or product.has_bias:
        product.write(matrix, bias)
        return
    product.write(matrix, None)
    cast(Tensor, norm.running_mean).sub_(bias)  # norm(y + b) is the norm with the mean m - b
