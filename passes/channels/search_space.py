"""`SearchSpace`: channels, ranks and branches of one network as the axes of one space.

A structure is a row of integers: the width of every channel group, then a rank for every layer that could become a sequence
(`rank_axes.py`), then 1 or 0 for every branch that is there or gone. What a branch that is gone holds of groups and ranks has no
meaning; the `Structure` of such a row has them whole, so that equal networks are equal structures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.branches import Branch
from compressor.passes.channels.costs import Costs
from compressor.passes.channels.layer_costs import Layer
from compressor.passes.channels.rank_axes import RankAxis, RankedCosts, rank_axes_of
from compressor.passes.labels.groups import ChannelGroup
from compressor.values.plan import Factorization, Structure

_NONE = Branch("", "", "", "", (), ())


@dataclass(frozen=True)
class BranchAxis(ChannelGroup):
    """A branch as a group of one unit that may go to width 0.

    Attributes, besides those of `ChannelGroup`:
        branch: The branch.
        holds: Names of the channel groups that nothing outside of the branch makes or reads.
    """

    branch: Branch = _NONE
    holds: tuple[str, ...] = ()

    @property
    def narrowest(self) -> int:
        """Gone."""
        return 0


@dataclass(frozen=True, eq=False)
class SearchSpace(ChannelGraph):
    """A network's channel groups, with the ranks of its layers and its branches behind them.

    Attributes, besides those of `ChannelGraph`:
        ranks: Of the layers that may become sequences.
        depth: Of the branches that may go.
    """

    ranks: tuple[RankAxis, ...] = ()
    depth: tuple[BranchAxis, ...] = ()

    @classmethod
    def of(cls, channels: ChannelGraph, ranks: bool = True, depth: bool = False) -> "SearchSpace":
        """With the axes that are asked for."""
        axes = rank_axes_of(channels) if ranks else ()
        branches = _axes(channels) if depth else ()
        return cls(channels.graph, channels.walk, channels.grouping, channels.digest, axes, branches)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups, then rank axes, then branch axes."""
        return (*self.grouping.groups, *self.ranks, *self.depth)

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The channel groups that may be narrowed; axes are not among them."""
        return self.plain.free

    @cached_property
    def plain(self) -> ChannelGraph:
        """The channel groups alone."""
        return ChannelGraph(self.graph, self.walk, self.grouping, self.digest)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """See `ChannelGraph`."""
        return self.plain.branches

    @cached_property
    def costs(self) -> RankedCosts:
        """Costs as a function of widths, ranks and branches."""
        layers = [Layer.of(self.plain, axis.layer) for axis in self.ranks]
        return RankedCosts(self.graph, self.walk.labeler, self.grouping, layers, [axis.branch for axis in self.depth])

    def costs_of(self, structure: Structure) -> Costs:
        """See `ChannelGraph`."""
        return self.plain.costs_of(structure)

    def widths(self, structures: Sequence[Structure]) -> NDArray[np.int64]:
        """Structures as rows; a layer without a rank has its full one."""
        ranks = [dict(structure.ranks) for structure in structures]
        own = np.array([[row.get(axis.name, axis.size) for axis in self.ranks] for row in ranks], dtype=np.int64)
        there = np.array([[int(axis.branch.name not in s.removed) for axis in self.depth] for s in structures], dtype=np.int64)
        count = len(structures)
        columns = [self.plain.widths(structures), own.reshape(count, len(self.ranks)), there.reshape(count, len(self.depth))]
        return np.concatenate(columns, axis=1)

    def structure_of(self, row: NDArray[np.int64]) -> Structure:
        """The structure of a row; ranks that would save nothing are left out."""
        groups, first = len(self.grouping.groups), len(self.grouping.groups) + len(self.ranks)
        gone = [axis for axis, there in zip(self.depth, row[first:].tolist(), strict=True) if not there]
        without = {name for axis in gone for name in axis.holds}
        found = self.plain.structure_of(row[:groups])
        sizes = {group.name: group.size for group in self.grouping.groups}
        widths = tuple((name, sizes[name] if name in without else width) for name, width in found.widths)
        ranks = self.costs.ranks(row[None])[0].tolist()
        factors = [Factorization(axis.layer, "svd", (rank,)) for axis, rank in zip(self.ranks, ranks, strict=True) if rank]
        within = {name for axis in gone for name in axis.branch.inside}
        removed = tuple(sorted(axis.branch.name for axis in gone if axis.branch.name not in within))
        return Structure(widths, tuple(pair for one in factors for pair in one.axes), (), removed)


def ranks_of(channels: ChannelGraph) -> tuple[RankAxis, ...]:
    """The rank axes of a network; none where ranks are not searched."""
    return channels.ranks if isinstance(channels, SearchSpace) else ()


def depth_of(channels: ChannelGraph) -> tuple[BranchAxis, ...]:
    """The branch axes of a network; none where branches stay."""
    return channels.depth if isinstance(channels, SearchSpace) else ()


def columns_within(channels: ChannelGraph) -> dict[int, tuple[int, ...]]:
    """Of the columns of a structure's row: that of each branch -> those of the widths, ranks and branches that it alone has."""
    column = {group.name: k for k, group in enumerate(channels.groups)}
    found = {}
    for axis in depth_of(channels):
        ranks = [own.name for own in ranks_of(channels) if own.layer in axis.branch.layers]
        inner = [f"branch {name}" for name in axis.branch.inside if f"branch {name}" in column]
        found[column[axis.name]] = tuple(column[name] for name in (*axis.holds, *ranks, *inner))
    return found


def _axes(channels: ChannelGraph) -> tuple[BranchAxis, ...]:
    groups, group_of = channels.grouping.groups, channels.grouping.group_of
    carried = {  # by each node
        node: {k for value in values for labels in value.axes.values() for k in np.unique(group_of[labels]).tolist()}
        for node, values in channels.walk.values.items()
    }
    axes = []
    for branch in _one_each(channels):
        inside = set(branch.nodes)
        within, outside = ({k for node, own in carried.items() if (node in inside) is here for k in own} for here in (True, False))
        holds = tuple(groups[k].name for k in sorted(within - outside) if k >= 0)
        axes.append(BranchAxis(f"branch {branch.name}", 1, branch.layers, (), None, ((0,),), 1, (), 0, branch, holds))
    return tuple(axes)


def _one_each(channels: ChannelGraph) -> list[Branch]:
    """Of two branches that meet in one addition the one with more MACs: one of them has to stay."""
    macs = channels.costs.by_node(channels.widths([channels.full])[0].tolist())
    found: dict[str, tuple[int, Branch]] = {}
    for branch in channels.branches:
        own = sum(macs.get(node, 0) for node in branch.nodes)
        if branch.at not in found or own > found[branch.at][0]:
            found[branch.at] = own, branch
    return [branch for _, branch in found.values()]
