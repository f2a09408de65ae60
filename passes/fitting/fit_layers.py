"""Fitting the layers of a narrowed network to what the original gives: the work behind `Compensate`, which explains it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, norm_of
from compressor.passes.fitting.jobs import Job
from compressor.passes.fitting.regression import Facts, Solution, error_of, pooled, solve, solve_held_out
from compressor.passes.fitting.samples import Samples
from compressor.passes.fitting.settings import Compensation, Repair
from compressor.passes.layers.product import Product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics, collect, parts_of
from compressor.passes.statistics.original_outputs import Original
from compressor.passes.statistics.partial_run import Prefix, Shelf

_ROUNDS = 1  # of a fit through an activation: two more gain a quarter of what the first one does, at twice the time


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
    own: Prefix | None = None,
) -> list[Repair]:
    """Fit layer after layer on what the network as repaired so far shows it; `narrowed` is changed in place.

    Args:
        channels: The analysis of the original network.
        narrowed: The narrowed one.
        jobs: The layers, in the order of the graph.
        calibration: Images.
        settings: How.
        seed: Of the positions that are looked at.
        original: What the original shows, where it is known.
        own: The narrowed network run up to the first layer, where it has been.
    """
    shelf = Shelf(settings.memory_mb << 20)
    targets = {job.target for job in jobs if job.target}
    original = original or Original(channels, calibration, settings.positions, seed, shelf, targets)
    own = own or Prefix(narrowed, calibration, shelf)
    repairs: list[Repair] = []
    for job in jobs:
        original.through(job.reader, job.target)
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
    facts = pooled(halves) if len(parts) == 1 else None
    if facts is not None and samples.linear is not None:
        for _ in range(_ROUNDS):
            facts = samples.behind_activation(facts, matrix, bias)
            solutions.append(solve(facts, job.product.matrix(), bias, solutions[0].ridge, settings.rescale))
            matrix, bias = solutions[-1].matrix, solutions[-1].bias
    before, after = (float(error.sum()) / max(variance, 1e-300) for error in (solutions[0].before, solutions[-1].after))
    if job.factorization is not None:
        matrix = job.reduced(own.graph, matrix, None if facts is None else facts.covariance)
        if facts is not None:
            bias = facts.target_mean - (matrix @ facts.mean[:, :, None])[:, :, 0]
            after = float(error_of(facts, matrix, bias).sum()) / max(variance, 1e-300)
    write(own.graph, job.reader, job.product, matrix, bias.flatten())
    held_out /= max(variance, 1e-300)
    return Repair(job.reader.layer, before, after, count, len(parts), max(s.ridge for s in solutions), held_out)


def write(graph: fx.GraphModule, reader: Reader, product: Product, matrix: Tensor, bias: Tensor) -> None:
    """Store weights and bias (outputs,); a batch norm behind a layer without a bias takes it, so that no parameter is added."""
    norm = norm_of(graph, reader.norm)
    if norm is None or product.has_bias:
        product.write(matrix, bias)
        return
    product.write(matrix, None)
    cast(Tensor, norm.running_mean).sub_(bias)  # norm(y + b) is the norm with the mean m - b
