"""Legal widths and ranks: which sizes a group may have on a target."""

import itertools
import math
from collections.abc import Sequence

from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.search_space import BranchAxis
from compressor.passes.labels.groups import ChannelGroup

_MOST_INSIDE = 3  # branches within one that may go; one around more of them stays, and they may go


def widths(group: ChannelGroup, align: int, edges: Sequence[int] | None = None) -> tuple[int, ...]:
    """The widths a search may choose for a group, ascending; the last is the whole group.

    Widths are multiples of `align` channels. A group too small for two of these steps gets half the
    step until it has two, so that no group is skipped; equal-count constraints are always kept.

    Args:
        group: The group; a frozen one has its own size as the only width.
        align: Channels that the target likes multiples of.
        edges: Right edges of the group's measured staircase: of two multiples on one step only the wider is worth choosing.
            Those of a rank are themselves the ranks.
    """
    if group.frozen is not None:
        return (group.size,)
    if isinstance(group, BranchAxis):
        return (0, 1) if len(group.branch.inside) <= _MOST_INSIDE else (1,)
    if isinstance(group, RankAxis):
        return (*sorted(r for r in edges if r <= group.largest), group.size) if edges is not None else group.legal(align)
    if edges is not None:
        legal = widths(group, align)
        own = [w for w, wider in itertools.pairwise(legal) if any(w <= edge < wider for edge in edges)]
        return (*own, group.size)
    step = math.lcm(group.granularity, align // math.gcd(align, group.channels_per_unit))
    while step * 2 > group.size and step % 2 == 0 and (step // 2) % group.granularity == 0:
        step //= 2
    return (*(width for width in range(step, group.size, step) if width >= group.narrowest), group.size)
