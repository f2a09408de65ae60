"""`analyze`: which channels of a traced graph live and die together, and what may be removed."""

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import fx

from compressor.errors import PlanError
from compressor.passes.channels.branches import Branch, branches_of
from compressor.passes.channels.costs import CostModel, Costs
from compressor.passes.channels.layer_costs import added
from compressor.passes.criteria import CRITERIA, Scoring, select
from compressor.passes.labels.groups import ChannelGroup, Grouping, make_groups
from compressor.passes.labels.labeler import IntArray
from compressor.passes.labels.walk import Walk, walk
from compressor.passes.tracing.shapes import shapes_of
from compressor.values.plan import Plan, Structure, digest_of

logger = logging.getLogger(__name__)

_MADE: "weakref.WeakValueDictionary[int, ChannelGraph]" = weakref.WeakValueDictionary()
"""Analyses that somebody holds, by the identity of their graph, which they keep alive."""


def analyze(graph: fx.GraphModule, lossy: bool = True) -> "ChannelGraph":
    """Find the channel groups of a traced graph.

    Args:
        graph: What `trace` returned, or a pass made of it.
        lossy: Whether channels may be removed that some op computes statistics over (a layer norm, a softmax
            or a mean over channels). It then computes them over the channels that stay, so that what the
            others become changes a little; such ops are named in `ChannelGroup.lossy`. False freezes these
            channels.

    Raises:
        PassError: `graph` is not a traced graph.
    """
    found = walk(graph)
    channels = ChannelGraph(graph, found, make_groups(found.labeler, lossy), digest_of_graph(graph))
    logger.info("analyze: %d groups, %d of them free", len(channels.groups), len(channels.free))
    _MADE[id(graph)] = channels
    return channels


def analysis_of(graph: fx.GraphModule) -> "ChannelGraph":
    """The analysis that was last made of a graph, while somebody holds it and the graph is as it was; else a new one.

    Raises:
        PassError: `graph` is not a traced graph.
    """
    found = _MADE.get(id(graph))
    if found is not None and found.graph is graph and found.digest == digest_of_graph(graph):
        return found
    return analyze(graph)


def digest_of_graph(graph: fx.GraphModule) -> str:
    """Digest of an architecture: ops, connections and shapes, but no weights. Latencies are stored under it."""
    nodes = [[n.name, str(n.target), [i.name for i in n.all_input_nodes], shapes_of(n)] for n in graph.graph.nodes]
    tensors = [[name, list(tensor.shape)] for name, tensor in sorted(graph.state_dict().items())]
    return digest_of([nodes, tensors])


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channel groups of a graph, and everything that can be asked about them.

    Attributes:
        graph: The graph that was analysed.
        walk: The labels of its values.
        grouping: From labels to groups.
        digest: Of the architecture; see `digest_of_graph`.
    """

    graph: fx.GraphModule
    walk: Walk
    grouping: Grouping
    digest: str

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """All groups, in the order of the layers that produce them, frozen ones included."""
        return self.grouping.groups

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be narrowed."""
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Ops without a rule, as `op at node`; whatever they touch is frozen."""
        return self.walk.unknown

    @cached_property
    def costs(self) -> CostModel:
        """Costs as a function of widths."""
        return CostModel(self.graph, self.walk.labeler, self.grouping, self.branches)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """What can be removed as a whole, in the order of the additions behind them."""
        return branches_of(self.graph)

    @property
    def full(self) -> Structure:
        """The structure of the graph as it is."""
        return Structure(tuple((group.name, group.size) for group in self.grouping.groups))

    def structure_of(self, row: NDArray[np.int64]) -> Structure:
        """The structure of a row as `widths` makes it, (groups,)."""
        return Structure(tuple((group.name, width) for group, width in zip(self.groups, row.tolist(), strict=True)))

    def structure(self, plan: Plan) -> Structure:
        """How many units of each group a plan keeps."""
        kept = dict(plan.kept)
        widths = tuple((g.name, len(kept[g.name]) if g.name in kept else g.size) for g in self.grouping.groups)
        gone = {layer for branch in self.branches if branch.name in plan.removed for layer in branch.layers}
        for layer in [*(layer for layer, _ in plan.reads), *(one.layer for one in plan.factors)]:
            if layer in gone:
                raise PlanError(f"the plan changes layer `{layer}`, which is in a branch that it removes")
        ranks = tuple(axis for one in plan.factors for axis in one.axes)
        return Structure(widths, ranks, tuple((layer, len(inputs)) for layer, inputs in plan.reads), plan.removed)

    def widths(self, structures: Sequence[Structure]) -> NDArray[np.int64]:
        """Structures as rows for `costs`."""
        rows = [dict(structure.widths) for structure in structures]
        return np.array([[row.get(g.name, g.size) for g in self.groups] for row in rows], dtype=np.int64)

    def with_branches(self, structure: Structure, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of a structure, (1, groups), with 1 or 0 behind it for every branch that is there or removed."""
        there = np.array([[branch.name not in structure.removed for branch in self.branches]], dtype=np.int64)
        return np.concatenate([row, there.reshape(1, -1)], axis=1)

    def costs_of(self, structure: Structure) -> Costs:
        """Costs of one structure, with the layers that read a part of a stream or are factorized; arrays of one entry.

        Raises:
            PlanError: Such a layer is not there, or its ranks are not possible.
        """
        row = self.widths([structure])
        found = self.costs(self.with_branches(structure, row))
        if not structure.reads and not structure.ranks:
            return found
        more = added(self, structure, row).values()
        macs, elements = sum(one.macs for one in more), sum(one.elements for one in more)
        more_bytes = sum(one.memory_bytes for one in more) + 8 * sum(count for _, count in structure.reads)  # a gather's index
        return Costs(found.macs + macs, found.params + elements, found.memory_bytes + more_bytes)

    def nearest(self, wanted: Mapping[str, float]) -> Structure:
        """The legal structure nearest to wanted widths.

        Groups are independent of one another (what must be thinned together is one group), so that the nearest
        legal width of each is the nearest legal structure. A tie goes to the wider one.

        Args:
            wanted: Group name -> width; a group that is not named, or is frozen, keeps its size.

        Raises:
            PlanError: A name is not that of a group.
        """
        unknown = set(wanted) - {group.name for group in self.groups}
        if unknown:
            raise PlanError(f"there is no group `{min(unknown)}`; compressor inspect lists them")
        widths = []
        for group in self.groups:
            steps = math.floor(wanted.get(group.name, group.size) / group.granularity + 0.5)
            free = group.frozen is None and group.name in wanted
            width = min(max(steps * group.granularity, group.narrowest), group.size) if free else group.size
            widths.append((group.name, width))
        return Structure(tuple(widths))

    def kept_masks(self, plan: Plan) -> list[NDArray[np.bool_]]:
        """One mask over the units of each group: what stays.

        Raises:
            PlanError: The plan is for another architecture, names an unknown or frozen group, an index
                beyond its size, or breaks an equal-count constraint; the group and the rule are named.
        """
        if plan.model and plan.model != self.digest:
            raise PlanError(
                f"the plan was made for another architecture (digest {plan.model[:12]}…, this one has {self.digest[:12]}…)"
            )
        by_name = {group.name: group for group in self.groups}
        masks = [np.ones(group.size, dtype=bool) for group in self.groups]
        for name, indices in plan.kept:
            group = by_name.get(name)
            if group is None:
                known = ", ".join(list(by_name)[:8])
                raise PlanError(f"the plan names group `{name}`, which is not there; groups are {known}, … (compressor inspect)")
            if indices[-1] >= group.size:
                raise PlanError(
                    f"group `{name}` has {group.size} channels, the plan keeps index {indices[-1]}; "
                    "was the plan made for another model? (compressor inspect)"
                )
            if group.frozen is not None and len(indices) < group.size:
                raise PlanError(f"group `{name}` is frozen: {group.frozen}")
            if len(indices) < min(group.least, group.size):
                ops = ", ".join(op for labels, _, op in self.walk.labeler.needs if name in self._names_of(labels))
                raise PlanError(f"the plan keeps {len(indices)} of group `{name}`, {ops} needs at least {group.least}")
            mask = masks[self.groups.index(group)]
            mask[:] = False
            mask[list(indices)] = True
        self._check_regular(masks)
        return masks

    def _names_of(self, labels: IntArray) -> set[str]:
        return {self.groups[k].name for k in np.unique(self.grouping.group_of[labels]).tolist() if k >= 0}

    def _check_regular(self, masks: list[NDArray[np.bool_]]) -> None:
        for blocks, op in self.walk.labeler.regular:
            counts = self.kept_labels(blocks.reshape(-1), masks).reshape(blocks.shape).sum(axis=1)
            if len(set(counts.tolist())) > 1:
                owners = np.unique(self.grouping.group_of[blocks])
                names = ", ".join(f"`{self.groups[k].name}`" for k in owners.tolist() if k >= 0)
                raise PlanError(
                    f"the plan leaves {counts.min()} to {counts.max()} channels in the blocks of {op}, which must keep "
                    f"equally many; keep the same number in every cell of group {names}"
                )

    def kept_labels(self, labels: IntArray, masks: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Mask over labels: what stays. Labels in no group always do."""
        return self.keeper(masks)(labels)

    def keeper(self, masks: Sequence[NDArray[np.bool_]]) -> Callable[[IntArray], NDArray[np.bool_]]:
        """The same as a function, for many questions about one plan."""
        sizes = [0, *[len(mask) for mask in masks]]
        first = np.cumsum(sizes)[:-1] if masks else np.zeros(1, dtype=np.int64)
        units = np.concatenate([*masks, np.ones(1, dtype=bool)])  # the last stands for labels in no group
        owner = self.grouping.group_of
        alive = units[np.where(owner < 0, len(units) - 1, first[owner] + self.grouping.unit_of)]
        return alive.__getitem__

    def slices(self, plan: Plan) -> list[tuple[str, int, tuple[int, ...]]]:
        """Every `(parameter or buffer name, axis, removed indices)` of a plan.

        The second axis of a grouped convolution's weight is left out where each block loses other positions: no one slice
        says that.

        Raises:
            PlanError: See `kept_masks`.
        """
        masks = self.kept_masks(plan)
        result = []
        for slot in self.walk.labeler.slots.values():
            kept = self.kept_labels(slot.labels, masks).reshape(slot.blocks, -1)
            if not kept.all() and (kept == kept[0]).all():
                result.append((slot.name, slot.axis, tuple(np.flatnonzero(~kept[0]).tolist())))
        return result

    def plan(self, ratio: float, seed: int | None = None) -> Plan:
        """A legal plan that removes a share of every free group.

        Args:
            ratio: Share of the units to remove, 0 to 1; at least one unit (of every cell) stays.
            seed: With a seed the removed units are drawn at random, without one those with the smallest
                L1 norm go.

        Raises:
            PlanError: `ratio` is not between 0 and 1.
        """
        if not 0 <= ratio <= 1:
            raise PlanError(f"ratio must be between 0 and 1, found {ratio}")
        criterion = CRITERIA["l1"]() if seed is None else CRITERIA["random"](seed=seed)
        scoring = Scoring(self)
        kept = {}
        for group in self.free:
            steps = group.size // group.granularity
            stay = max(steps - round(ratio * steps), group.narrowest // group.granularity)
            kept[group.name] = select(group, criterion(scoring, group), stay * group.granularity)
        return Plan.keep(kept, self.digest)
