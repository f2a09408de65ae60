"""Engines for a latency model: which structures to build, and building them, each one only once."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BackendError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.latency_model.blocks import blocks_of, times_by_block
from compressor.runtime.latency_model.model import LatencyModel, Observation
from compressor.runtime.measuring.measure import Comparison
from compressor.runtime.measuring.store import MeasurementStore
from compressor.runtime.timing.protocol import PROTOCOL, Protocol
from compressor.values.plan import Factorization, Plan, Structure
from compressor.values.progress import Progress
from compressor.values.target import Target

logger = logging.getLogger(__name__)

COARSE = Protocol(half_width=0.02)
"""Of engines that a model is fitted to: what it is off by between them is more than that, and the search measures what it takes."""

_KEPT_AS = f"{PROTOCOL} coarse"  # in the store of measurements


def train_latency_model(
    channels: ChannelGraph,
    widths: Sequence[Sequence[int]],
    target: Target,
    engines: int = 40,
    seed: int = 0,
    protocol: Protocol | None = None,
    store: MeasurementStore | None = None,
    progress: Progress | None = None,
    observed: Callable[[Sequence[Structure], float | None], list[Observation]] | None = None,
) -> LatencyModel:
    """Build and measure engines, and fit a latency model to them.

    Args:
        channels: The analysis of the network.
        widths: For every group the widths that may be asked for, ascending (`methods.structures.legal_widths`, or the right edges
            of its staircase).
        target: Where.
        engines: How many engines; those already in the store are not built again.
        seed: Of the choice.
        protocol: Of the timing; `COARSE` by default.
        store: Where measurements are kept; the user's cache by default.
        progress: Where to say how far it is.
        observed: Builds and measures in place of `observe`, elsewhere.

    Raises:
        BackendError: Too few engines can be built.
    """
    rows = _in_few_topologies(spread(widths, engines, seed), widths, seed)
    structures = [channels.structure_of(row) for row in rows]
    if observed is not None:
        return LatencyModel(channels, observed(structures, None))
    return LatencyModel(channels, list(observe(channels, structures, target, protocol, store, progress)))


def spread(widths: Sequence[Sequence[int]], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Structures that cover every width of every group evenly (a Latin hypercube), the whole and the least network among them.

    Returns:
        (count, groups).
    """
    random = np.random.default_rng(seed)
    columns = []
    for options in widths:
        strata = (np.arange(count - 2) + random.random(count - 2)) / max(count - 2, 1)
        random.shuffle(strata)
        middle = [options[int(s * len(options))] for s in strata]
        columns.append([options[-1], options[0], *middle])
    return np.array(columns, dtype=np.int64).T


def _in_few_topologies(rows: NDArray[np.int64], widths: Sequence[Sequence[int]], seed: int) -> NDArray[np.int64]:
    """The structures with branches gone in few combinations, one after the other: all, none, one half, the other half.

    Networks that differ in widths alone are lowered without the exporter (`runtime/onnx/templates.py`), which is most of an
    engine's time; and what each layer takes is timed by itself, so that more combinations would say little more.
    """
    branches = [k for k, own in enumerate(widths) if 0 in own]
    if not branches:
        return rows
    half = np.random.default_rng(seed).permutation(len(branches)) % 2
    there = np.stack([np.ones_like(half), half, 1 - half])
    which = np.sort(np.arange(len(rows) - 2) % 3)
    found = np.concatenate([rows[:1], rows[2:], rows[1:2]])  # the whole network first, the least one last
    found[1:-1, branches] = there[which]
    return found


def observe(
    channels: ChannelGraph,
    structures: Sequence[Structure],
    target: Target,
    protocol: Protocol | None = None,
    store: MeasurementStore | None = None,
    progress: Progress | None = None,
    anchor_ms: float | None = None,
) -> Iterator[Observation]:
    """Build and measure structures, one after the other, beside the original network.

    Latencies are the ratio to the original in the same session, times one latency of the original, so that a machine
    that is slower for a minute (or a day) does not look like a slower network.

    Args:
        channels: The analysis of the network.
        structures: What to build.
        target: Where.
        protocol: Of the timing; `COARSE` by default.
        store: Where measurements are kept; the user's cache by default.
        progress: Where to say how far it is.
        anchor_ms: The original's latency that ratios are multiplied by; that of the first session by default. To compare with a
            model, its own (`LatencyModel.reference_ms`).
    """
    kept = MeasurementStore() if store is None else store
    fingerprint, blocks = target.fingerprint(), blocks_of(channels)
    anchor = anchor_ms
    with Comparison(channels.graph, target, protocol=protocol or COARSE) as comparison:
        for k, structure in enumerate(structures):
            built = f"{channels.digest}:{structure.digest}"
            known = kept.get(built, fingerprint, _KEPT_AS)
            if known is None or not _complete(known[1]):
                graph = applied(plan_of(channels, structure), channels)
                try:
                    found, reference, layers = comparison.examine(graph)
                except BackendError as error:
                    logger.warning("structure %s is left out: %s", structure.digest[:12], error)
                    continue
                times, rest = times_by_block(blocks, layers)
                extra: dict[str, object] = {"reference_ms": reference.median_ms, "blocks_ms": times, "rest_ms": rest}
                kept.put(built, found, _KEPT_AS, extra)
                known = found, extra
            found, extra = known
            reference_ms = _number(extra["reference_ms"])
            anchor = anchor or reference_ms
            if progress:
                progress.tick(k + 1, len(structures), f"engines: {found.median_ms / reference_ms:.3f} of the original's latency")
            yield _observation(structure, found.median_ms / reference_ms, anchor, extra)


def _complete(extra: Mapping[str, object]) -> bool:
    """Whether a record of the store has what an observation is made of; one of another shape is measured anew."""
    times = extra.get("blocks_ms")
    numbers = [extra.get("reference_ms"), extra.get("rest_ms"), *(times.values() if isinstance(times, dict) else [None])]
    return all(isinstance(x, int | float) and 0 <= x < 1e9 for x in numbers) and bool(extra["reference_ms"])


def _observation(structure: Structure, ratio: float, reference_ms: float, extra: dict[str, object]) -> Observation:
    """Layers are timed in a session of their own: their sum is scaled to the whole, which carries the finer number."""
    median_ms = ratio * reference_ms
    times = extra["blocks_ms"]
    assert isinstance(times, dict)
    total = sum(times.values()) + _number(extra["rest_ms"])
    scale = median_ms / total if total else 0.0
    return Observation(structure, median_ms, reference_ms, tuple((name, value * scale) for name, value in times.items()))


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def plan_of(channels: ChannelGraph, structure: Structure) -> Plan:
    """A plan with the widths of a structure; *which* channels stay does not matter for a latency."""
    widths = dict(structure.widths)
    kept = {}
    for group in channels.free:
        width = widths.get(group.name, group.size)
        if width < group.size:
            kept[group.name] = [unit for cell in group.cells for unit in cell[: group.quota(cell, width)]]
    return Plan.keep(kept, channels.digest, factors=Factorization.of_axes(structure.ranks), removed=structure.removed)
