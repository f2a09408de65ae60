"""`LatencyModel`: latency of any structure from a table of measured blocks, calibrated on whole engines.

A search asks for thousands of structures and cannot build them all. So a few dozen engines are built, timed as a whole,
and asked for the time of each of their layers, *in place*: summing separately measured layers misses what fusion,
caches and layout changes do. Every engine gives one sample for each of its blocks.

For every kind of block the time of reading i and making o channels is

    t(i, o) = (c0 + c1 u + c2 v + c3 u v + what a width off the step costs) * (1 + r(i, o)),    u = ceil(i / s), v = ceil(o / s)

with coefficients >= 0 (a wider layer is never faster), the step s of the staircase chosen by how well it explains the
samples, and r the residual of the samples nearby, so that with many samples the table speaks and with few the
formula. The latency of a network is a * (sum of its blocks) + b, fitted to the whole engines; how far that is off
is estimated on engines left out of the fit. A back end that does not tell its layers (PyTorch) is fitted to whole
engines alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from compressor.errors import BackendError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.runtime.latency_model.blocks import Block, Kind, blocks_of, by_kind, widths_in
from compressor.values.plan import Structure

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
_STEPS = (1, 4, 8, 16, 32, 64)
_RADIUS = 0.12  # of the neighbourhood, in the logarithm of a width: about 12 %
_LEAST_ENGINES = 6


@dataclass(frozen=True)
class Observation:
    """One engine that was built and measured.

    Attributes:
        structure: What was built.
        median_ms: Its latency.
        reference_ms: Latency of the original network that it was compared with, the same for all observations of a model.
        blocks_ms: Milliseconds per block, in place; empty where the back end does not tell.
    """

    structure: Structure
    median_ms: float
    reference_ms: float
    blocks_ms: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ModelError:
    """How far a model is off on engines that it has not seen, relative.

    Attributes:
        median: Of the absolute errors.
        p90: Their 90th percentile.
        engines: How many engines it was estimated on.
    """

    median: float
    p90: float
    engines: int


@dataclass(frozen=True)
class _Formula:
    """Time of one kind of block; see the module."""

    step: int
    coefficients: Floats
    samples: Floats  # (n, 3): reads, makes, relative residual

    def __call__(self, widths: Floats) -> Floats:
        """Milliseconds for (n, 2) widths."""
        plain = _features(widths, self.step) @ self.coefficients
        if not len(self.samples):
            return plain
        distance = np.log(widths)[:, None, :] - np.log(self.samples[None, :, :2])
        weight = np.exp(-(distance**2).sum(axis=2) / (2 * _RADIUS**2))
        return np.asarray(plain * (1 + (weight * self.samples[:, 2]).sum(axis=1) / (weight.sum(axis=1) + 1.0)))


def _features(widths: Floats, step: int) -> Floats:
    reads, makes = widths[:, 0], widths[:, 1]
    u, v = np.ceil(reads / step), np.ceil(makes / step)
    off = (makes % step > 0).astype(float), (reads % step > 0).astype(float)
    return np.stack([np.ones_like(u), u, v, u * v, off[0] * u * v, off[1] * u * v, off[0] * v, off[1] * u], axis=1)


class LatencyModel:
    """Predicts the latency of structures of one network on one target.

    Args:
        channels: The analysis of the network.
        observations: Engines that were measured.

    Attributes:
        observations: The same.
        reference_ms: Latency of the original network; divide by it for a ratio.

    Raises:
        BackendError: There are fewer than six.
    """

    def __init__(self, channels: ChannelGraph, observations: Sequence[Observation]) -> None:
        if len(observations) < _LEAST_ENGINES:
            raise BackendError(f"a latency model needs at least {_LEAST_ENGINES} measured engines, found {len(observations)}")
        self._channels = channels
        self._blocks = blocks_of(channels)
        self.observations = tuple(observations)
        self.reference_ms = self.observations[0].reference_ms
        self._fit = _fit(channels, self._blocks, self.observations)

    def __call__(self, structure: Structure) -> float:
        """Latency of a structure in milliseconds."""
        return float(self.predict(self._channels.widths([structure]))[0])

    def predict(self, rows: NDArray[np.int64] | Sequence[Sequence[int]]) -> Floats:
        """Latencies of many structures in milliseconds.

        Args:
            rows: (structures, groups): the width of every group, in the order of the groups.
        """
        return self._fit(self._channels, self._blocks, np.asarray(rows, dtype=np.int64))

    def observed(self, observation: Observation) -> "LatencyModel":
        """The model with one more engine."""
        return LatencyModel(self._channels, [*self.observations, observation])

    @cached_property
    def error(self) -> ModelError:
        """Its error, from five fits that each leave a fifth of the engines out."""
        count = len(self.observations)
        errors = np.empty(count)
        for fold in range(5):
            out = np.arange(count) % 5 == fold
            kept = [o for o, left in zip(self.observations, out, strict=True) if not left]
            fit = _fit(self._channels, self._blocks, kept)
            rows = self._channels.widths([o.structure for o, left in zip(self.observations, out, strict=True) if left])
            measured = np.array([o.median_ms for o in self.observations])[out]
            errors[out] = np.abs(fit(self._channels, self._blocks, rows) / measured - 1)
        return ModelError(float(np.median(errors)), float(np.percentile(errors, 90)), count)

    def interval(self, structure: Structure) -> tuple[float, float]:
        """Where nine of ten such structures lie."""
        found, off = self(structure), self.error.p90
        return found * (1 - off), found * (1 + off)


@dataclass(frozen=True)
class _Fit:
    formulas: dict[Kind, _Formula]
    scale: float
    offset: float

    def __call__(self, channels: ChannelGraph, blocks: Sequence[Block], rows: NDArray[np.int64]) -> Floats:
        widths = widths_in(channels, blocks, rows).astype(np.float64)
        return self.scale * _sums(self.formulas, blocks, widths) + self.offset


def _sums(formulas: dict[Kind, _Formula], blocks: Sequence[Block], widths: Floats) -> Floats:
    """Sum of all blocks: (structures,) from (structures, blocks, 2). Equal widths are computed once."""
    total = np.zeros(len(widths))
    for kind, indices in by_kind(blocks).items():
        if kind not in formulas:
            continue
        pairs = widths[:, indices].reshape(-1, 2)
        distinct, inverse = np.unique(pairs[:, 0] * 2**24 + pairs[:, 1], return_inverse=True)
        values = np.zeros(len(distinct))
        there = distinct > 0  # a block that a structure does not have takes no time
        values[there] = formulas[kind](np.stack([distinct[there] // 2**24, distinct[there] % 2**24], axis=1))
        total += values[inverse].reshape(len(widths), -1).sum(axis=1)
    return total


def _fit(channels: ChannelGraph, blocks: Sequence[Block], observations: Sequence[Observation]) -> _Fit:
    rows = channels.widths([o.structure for o in observations])
    widths = widths_in(channels, blocks, rows).astype(np.float64)
    measured = np.array([o.median_ms for o in observations])
    if not any(o.blocks_ms for o in observations):
        return _fit_whole(blocks, widths, measured)
    times = [dict(o.blocks_ms) for o in observations]
    formulas = {}
    for kind, indices in by_kind(blocks).items():
        samples = [
            (*widths[n, k], times[n][blocks[k].name])
            for n in range(len(observations))
            for k in indices
            if blocks[k].name in times[n] and widths[n, k].all()
        ]
        if samples:
            formulas[kind] = _formula(np.array(samples))
        elif widths[:, indices].any():
            logger.warning(
                "latency model: no engine tells the time of blocks like %s; they count as nothing", blocks[indices[0]].name
            )
    sums = _sums(formulas, blocks, widths)
    scale, offset = _affine(sums, measured)
    return _Fit(formulas, scale, offset)


def _formula(samples: Floats) -> _Formula:
    """The step that explains the samples best, its coefficients, and what is left over."""
    widths, times = samples[:, :2], np.maximum(samples[:, 2], 1e-6)
    best: tuple[float, int, Floats] | None = None
    for step in _STEPS:
        features = _features(widths, step)
        coefficients, _ = nnls(features / times[:, None], np.ones(len(times)))
        off = float(np.mean(np.abs(features @ coefficients / times - 1)))
        if best is None or off < 0.97 * best[0]:  # a coarser step has to explain more
            best = (off, step, coefficients)
    assert best is not None
    _, step, coefficients = best
    residual = times / np.maximum(_features(widths, step) @ coefficients, 1e-9) - 1
    return _Formula(step, coefficients, np.column_stack([widths, np.clip(residual, -0.5, 1.0)]))


def _affine(sums: Floats, measured: Floats) -> tuple[float, float]:
    """Scale and offset >= 0 with the least relative error."""
    design = np.stack([sums, np.ones_like(sums)], axis=1) / measured[:, None]
    (scale, offset), _ = nnls(design, np.ones(len(sums)))
    return float(scale), float(offset)


def _fit_whole(blocks: Sequence[Block], widths: Floats, measured: Floats) -> _Fit:
    """All kinds at once, from the latencies of whole engines; the step is common to all."""
    kinds = by_kind(blocks)
    best: tuple[float, int, Floats] | None = None
    for step in _STEPS:
        columns = []
        for indices in kinds.values():
            pairs = widths[:, indices].reshape(-1, 2)
            there = pairs[:, 1:] > 0  # a block that a structure does not have takes no time
            columns.append((_features(pairs, step) * there).reshape(len(widths), len(indices), -1).sum(axis=1))
        stacked = np.concatenate([c[:, :4] for c in columns], axis=1) / measured[:, None]
        design = np.concatenate([stacked, 1 / measured[:, None]], axis=1)
        ridge = 1e-3 * np.diag(design.mean(axis=0))
        target = np.concatenate([np.ones(len(measured)), np.zeros(len(ridge))])
        coefficients, _ = nnls(np.concatenate([design, ridge]), target)
        off = float(np.mean(np.abs(design @ coefficients - 1)))
        if best is None or off < 0.97 * best[0]:
            best = (off, step, coefficients)
    assert best is not None
    _, step, found = best
    formulas = {
        kind: _Formula(step, np.concatenate([found[4 * k : 4 * k + 4], np.zeros(4)]), np.zeros((0, 3)))
        for k, kind in enumerate(kinds)
    }
    return _Fit(formulas, 1.0, float(found[-1]))
