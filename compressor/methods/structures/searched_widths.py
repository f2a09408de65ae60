"""Pruning steps: which widths of a group are worth a search's time."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from torch import nn

from compressor.errors import BackendError, BudgetError
from compressor.methods.base import Problem
from compressor.methods.structures.legal_widths import widths
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.search_space import BranchAxis
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.tracing.shapes import shapes_of
from compressor.runtime.latency_model.single_layers import rank_edges
from compressor.runtime.latency_model.staircase import measure_staircase, piece_of
from compressor.runtime.timing.protocol import Protocol

logger = logging.getLogger(__name__)

Steps = Literal["staircase", "eighths", "align"]

_QUICK = Protocol(half_width=0.01, max_samples=200, max_s=1.5)  # an edge matters by some percent


def options_of(problem: Problem, steps: Steps, groups: frozenset[str] | None = None) -> list[tuple[int, ...]]:
    """Legal widths of every group, ascending; those not among `groups` stay whole.

    Args:
        problem: The network and its target.
        steps: `align`: multiples of the target's `align`; `staircase`: those of them that no wider one was measured to be as fast
            as on the target (groups whose layers have the same shapes are measured once); `eighths`: multiples of an eighth
            of the group, as AACP.
        groups: Names; all by default.

    Raises:
        BudgetError: There are no such steps.
    """
    if steps not in ("staircase", "eighths", "align"):
        raise BudgetError(f"there are no steps {steps!r}; there are staircase, eighths and align")
    return [
        _options(problem, steps, group) if (groups is None or group.name in groups) and group.frozen is None else (group.size,)
        for group in problem.channels.groups
    ]


def above_quota(group: ChannelGroup, legal: tuple[int, ...], align: int, share: float) -> tuple[int, ...]:
    """Those widths of a group that leave a share of it, and at least two channels; ranks and branches have no such quota.

    Args:
        group: The group.
        legal: Its widths, ascending; all but the whole group may lie below the quota, then multiples of `align` above it are given.
        align: Of the target.
        share: That stays.
    """
    if isinstance(group, RankAxis | BranchAxis) or len(legal) == 1:
        return legal
    least = max(int(np.ceil(share * group.size)), 2)
    found = tuple(w for w in legal if w >= least or w == group.size)
    return found if len(found) > 1 else tuple(w for w in widths(group, align) if w >= least or w == group.size)


def _options(problem: Problem, steps: Steps, group: ChannelGroup) -> tuple[int, ...]:
    if isinstance(group, BranchAxis):
        return widths(group, problem.target.align)
    if isinstance(group, RankAxis):
        return _ranks(problem, steps, group)
    if steps == "eighths":
        step = max(group.size // 8 // group.granularity, 1) * group.granularity
        legal = [w for w in range(step, group.size, step) if w >= group.narrowest]
        return (*legal, group.size)
    legal_widths = widths(group, problem.target.align)
    if steps == "align" or len(legal_widths) == 1:
        return legal_widths
    edges = _edges(problem, group, legal_widths)
    found = widths(group, problem.target.align, edges) if edges is not None else legal_widths
    return found if len(found) > 1 else legal_widths


def _ranks(problem: Problem, steps: Steps, axis: RankAxis) -> tuple[int, ...]:
    align = problem.target.align
    if steps == "eighths":
        eighths = {axis.largest * k // 8 for k in range(1, 9)}
        return widths(axis, align, sorted({rank // align * align if rank > align else max(rank, 1) for rank in eighths}))
    if steps == "staircase":
        edges = rank_edges(problem.channels, axis.layer, "svd", axis.size, align, problem.target, problem.once, problem.seed)
        found = widths(axis, align, edges)
        return found if len(found) > 1 else widths(axis, align)
    return widths(axis, align)


def _edges(problem: Problem, group: ChannelGroup, legal: Sequence[int]) -> list[int] | None:
    """Right edges of the staircase; None where it cannot be measured."""
    try:
        layers = piece_of(problem.channels, group)
    except BackendError as error:
        logger.info("steps of %s: multiples of the target's align (%s)", group.name, error)
        return None

    def work() -> dict[str, object]:
        problem.progress.stage(f"staircase of {group.name}")
        try:
            found = measure_staircase(problem.channels, group, problem.target, _QUICK, problem.seed, most=40, legal=legal)
        except BackendError as error:
            return {"edges": None, "reason": str(error)}
        return {"edges": list(found.edges), "widths": list(found.widths), "ms": list(found.ms)}

    record = problem.once(f"staircase of {_shape(problem, group, layers)}, {len(legal)} widths from {legal[0]}", work)
    return cast("list[int] | None", record["edges"])


def _shape(problem: Problem, group: ChannelGroup, layers: Sequence[str]) -> str:
    """What a group's piece of the network looks like: groups of one shape have one staircase."""
    parts = [f"{group.size}x{group.channels_per_unit} step {group.granularity}"]
    nodes: dict[str, Any] = {str(n.target): n for n in problem.channels.graph.graph.nodes if n.op == "call_module"}
    for name in layers:
        conv = cast(nn.Conv2d, problem.channels.graph.get_submodule(name))
        image = "x".join(str(size) for size in shapes_of(nodes[name].args[0])[0][2:])
        parts.append(f"{conv.in_channels}-{conv.out_channels} k{conv.kernel_size} s{conv.stride} g{conv.groups} at {image}")
    return ", ".join(parts)
