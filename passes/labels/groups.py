"""From labels to channel groups.

1. Tied labels form one *unit* (connected components): it lives or dies as a whole.
2. Units that lie in exactly the same places (the same axes of the same tensors, equally often, frozen for
   the same reason) are interchangeable and form a *group*: one width, one integer axis of the search space.
3. Equal-count constraints (grouped convolutions) merge the groups they span and split them into *cells*,
   the intersections of all their blocks: a legal width takes the same share of every cell, so that equal
   blocks stay equal whatever constraints meet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compressor.passes.labels.labeler import IntArray, Labeler


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several tensors that live and die together.

    Attributes:
        name: The first layer that produces them (with `#2`, `#3` if that layer feeds several groups).
        size: How many units there are; plans keep indices below it.
        layers: The layers that produce these channels.
        readers: The layers that read them.
        frozen: Why none of them may be removed, or None.
        cells: Unit indices that must be thinned in proportion; a single cell unless a grouped op asks for more.
        channels_per_unit: Output channels of the first layer in one unit.
        lossy: Ops that compute statistics over these channels; afterwards over those that stay.
        least: How many units some op needs (an unbiased variance is not defined over one).
    """

    name: str
    size: int
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    frozen: str | None
    cells: tuple[tuple[int, ...], ...]
    channels_per_unit: int
    lossy: tuple[str, ...]
    least: int = 1

    @property
    def narrowest(self) -> int:
        """The smallest legal width."""
        return min(-(-self.least // self.granularity) * self.granularity, self.size)

    @property
    def granularity(self) -> int:
        """Legal widths are multiples of this."""
        return self.size // math.gcd(*[len(cell) for cell in self.cells])

    def quota(self, cell: Sequence[int], width: int) -> int:
        """How many of a cell's units a legal width takes: its share, so that every block keeps equally many."""
        return len(cell) * width // self.size


@dataclass(frozen=True)
class Grouping:
    """Groups, and the way from labels to them.

    Attributes:
        groups: In the order of the layers that produce them.
        group_of: Label -> index of its group, -1 where it is in none (it always stays).
        unit_of: Label -> index of its unit within the group.
    """

    groups: tuple[ChannelGroup, ...]
    group_of: IntArray
    unit_of: IntArray


def make_groups(labeler: Labeler, lossy: bool) -> Grouping:
    """Work out units and groups.

    Args:
        labeler: The facts of a walk.
        lossy: Whether channels that a statistic is computed over may be removed (they are frozen otherwise).
    """
    component = _components(labeler)
    if labeler.blocks:
        _decide_blocks(labeler, component)
        component = _components(labeler)
    count = int(component.max()) + 1 if len(component) else 0
    reasons = _reasons(labeler, component, count, lossy)
    produced = np.zeros(count, dtype=bool)
    for labels, _ in labeler.produced:
        produced[component[labels]] = True
    places = _kinds(labeler, component, reasons, produced)
    kind, blocked = _merge_regular(labeler, component, places, produced)
    return _build(labeler, component, kind, places, blocked, reasons)


def _components(labeler: Labeler) -> IntArray:
    if not labeler.count:
        return np.zeros(0, dtype=np.int64)
    left = np.concatenate([a for a, _ in labeler.ties] or [np.zeros(0, dtype=np.int64)])
    right = np.concatenate([b for _, b in labeler.ties] or [np.zeros(0, dtype=np.int64)])
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(labeler.count, labeler.count))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component, dtype=np.int64)


def _decide_blocks(labeler: Labeler, component: IntArray) -> None:
    """Rows of `Labeler.blocks` are tied as a whole, or kept equal where a grouped op needs them all."""
    for blocks, op, node in labeler.blocks:
        owner = np.full(int(component.max()) + 1, -1, dtype=np.int64)
        owner[component[blocks]] = np.arange(len(blocks))[:, None]
        touched = [[len(np.unique(own[own >= 0])) for own in owner[component[rows]]] for rows, _ in labeler.regular]
        if any(max(counts) > 0 and min(c for c in counts if c) < 2 for counts in touched):
            labeler.lose(blocks, op, node)
            labeler.keep_regular(blocks, op)
        else:
            labeler.ties += [(blocks[:, 0], blocks[:, column]) for column in range(1, blocks.shape[1])]
    labeler.blocks.clear()


def _reasons(labeler: Labeler, component: IntArray, count: int, lossy: bool) -> list[str | None]:
    reasons: list[str | None] = [None] * count
    facts = list(labeler.frozen)
    if not lossy:
        facts += [(labels, f"{op} computes statistics over them (lossy; lossy=True allows it)") for labels, op in labeler.lossy]
    for labels, reason in facts:
        for c in np.unique(component[labels]).tolist():
            reasons[c] = reasons[c] or reason
    return reasons


def _kinds(labeler: Labeler, component: IntArray, reasons: Sequence[str | None], produced: np.ndarray) -> IntArray:
    """Component -> kind: equal where units lie in the same places equally often. -1 where nothing produces it.

    The places of a unit are hashed into 64 bits as a sum of one random number per place, so that order
    does not matter; the chance of any collision among 10,000 units is below 1e-11.
    """
    random = np.random.default_rng(0)
    signature = np.zeros(len(reasons), dtype=np.uint64)
    places = [slot.labels for slot in labeler.slots.values()]
    places += [labels for term in labeler.terms for labels, _ in term.factors]
    places += labeler.places
    for labels in places:
        np.add.at(signature, component[labels], random.integers(1, 2**63, dtype=np.uint64))
    weights = {reason: random.integers(1, 2**63, dtype=np.uint64) for reason in dict.fromkeys(reasons)}
    signature += np.array([weights[reason] for reason in reasons], dtype=np.uint64)
    kind = np.full(len(reasons), -1, dtype=np.int64)
    _, inverse = np.unique(signature[produced], return_inverse=True)
    kind[produced] = inverse
    return kind


def _merge_regular(
    labeler: Labeler, component: IntArray, kind: IntArray, produced: np.ndarray
) -> tuple[IntArray, dict[int, list[tuple[IntArray, str]]]]:
    """Merge the kinds that an equal-count constraint spans; also returns the constraints per merged kind."""
    if not labeler.regular:
        return kind, {}
    edges = []
    for blocks, _ in labeler.regular:
        spanned = np.unique(kind[component[blocks.reshape(-1)]])
        spanned = spanned[spanned >= 0]
        edges += [(int(spanned[0]), int(other)) for other in spanned[1:]]
    count = int(kind.max()) + 1
    left, right = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    _, together = connected_components(coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count)))
    merged = np.where(kind < 0, -1, np.asarray(together, dtype=np.int64)[kind])
    blocked: dict[int, list[tuple[IntArray, str]]] = {}
    for blocks, op in labeler.regular:
        members = component[blocks.reshape(-1)]
        fixed = not produced[members].all()
        for k in np.unique(merged[members]).tolist():
            if k >= 0:
                reason = f"{op} needs equal blocks, some of which cannot shrink" if fixed else ""
                blocked.setdefault(k, []).append((component[blocks], reason))
    return merged, blocked


def _build(
    labeler: Labeler,
    component: IntArray,
    kind: IntArray,
    places: IntArray,
    blocked: dict[int, list[tuple[IntArray, str]]],
    reasons: list[str | None],
) -> Grouping:
    first = np.full(len(kind), np.iinfo(np.int64).max)  # the first produced label of each component: its order
    order = 0
    for labels, _ in labeler.produced:
        np.minimum.at(first, component[labels], np.arange(order, order + len(labels)))
        order += len(labels)
    least = _least(labeler, component, kind)
    producers, readers, lossy = (_names(kind[component], facts) for facts in (labeler.produced, labeler.read, labeler.lossy))

    order_of = np.lexsort((first, kind))
    order_of = order_of[kind[order_of] >= 0]
    starts = np.flatnonzero(np.diff(kind[order_of], prepend=-1))
    members_of = {int(kind[members[0]]): members for members in np.split(order_of, starts[1:]) if len(members)}
    sequence = sorted(members_of, key=lambda k: int(first[members_of[k][0]]))
    group_of_component = np.full(len(kind), -1, dtype=np.int64)
    unit_of_component = np.full(len(kind), -1, dtype=np.int64)
    groups: list[ChannelGroup] = []
    used: dict[str, int] = {}
    for k in sequence:
        members = members_of[k]
        group_of_component[members] = len(groups)
        unit_of_component[members] = np.arange(len(members))
        layers = producers[k]
        layer = next(iter(layers))
        used[layer] = used.get(layer, 0) + 1
        cells, broken = _cells(members, places, blocked.get(k, []))
        frozen = next((reasons[c] for c in members.tolist() if reasons[c]), None) or broken
        groups.append(
            ChannelGroup(
                name=layer if used[layer] == 1 else f"{layer}#{used[layer]}",
                size=len(members),
                layers=tuple(layers),
                readers=tuple(readers.get(k, {})),
                frozen=frozen,
                cells=cells,
                channels_per_unit=max(layers[layer] // len(members), 1),
                lossy=tuple(lossy.get(k, {})),
                least=least.get(k, 1),
            )
        )
    return Grouping(tuple(groups), group_of_component[component], unit_of_component[component])


def _least(labeler: Labeler, component: IntArray, kind: IntArray) -> dict[int, int]:
    """Kind -> how many units must stay so that every op has as many channels as it needs."""
    least: dict[int, int] = {}
    for labels, count, _ in labeler.needs:
        own = component[labels]
        kinds = np.unique(kind[own])
        if len(kinds) == 1 and kinds[0] >= 0:  # several groups keep one unit each at least
            each = len(own) // len(np.unique(own))
            least[int(kinds[0])] = max(least.get(int(kinds[0]), 1), -(-count // each))
    return least


def _names(kind_of: IntArray, facts: Sequence[tuple[IntArray, str]]) -> dict[int, dict[str, int]]:
    """Kind -> name -> how many of its labels the first fact of that name is about, in the order of the facts."""
    found: dict[int, dict[str, int]] = {}
    for labels, name in facts:
        for k, hits in zip(*np.unique(kind_of[labels], return_counts=True), strict=True):
            found.setdefault(int(k), {}).setdefault(name, int(hits))
    return found


def _cells(
    members: IntArray, places: IntArray, constraints: list[tuple[IntArray, str]]
) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """Units in the same places and the same blocks of every constraint; a reason where no width but the full one is legal."""
    if not constraints:
        return (tuple(range(len(members))),), None
    random = np.random.default_rng(1)
    _, place = np.unique(places[members], return_inverse=True)
    signature = random.integers(1, 2**63, size=int(place.max()) + 1, dtype=np.uint64)[place]
    ascending = np.argsort(members)
    broken = None
    for blocks, reason in constraints:
        broken = broken or reason or None
        for row in blocks:
            at = ascending[np.searchsorted(members[ascending], row).clip(max=len(members) - 1)]
            np.add.at(signature, at[members[at] == row], random.integers(1, 2**63, dtype=np.uint64))
    _, inverse = np.unique(signature, return_inverse=True)
    cells = [np.flatnonzero(inverse == k) for k in range(int(inverse.max()) + 1)]
    cells.sort(key=lambda cell: int(cell[0]))
    if len(cells) > 1 and math.gcd(*[len(cell) for cell in cells]) == 1:
        broken = broken or "ops that work on equal blocks leave no width between none and all"
    return tuple(tuple(cell.tolist()) for cell in cells), broken


def live_counts(labels: IntArray, grouping: Grouping) -> tuple[int, dict[int, int]]:
    """How many positions always stay, and how many more for each unit that every cell of a group keeps.

    Args:
        labels: The labels along an axis.
        grouping: The groups.

    Returns:
        The positions that no plan removes, and per group index the slope of the count in `width / granularity`.
    """
    owner, unit = grouping.group_of[labels], grouping.unit_of[labels]
    fixed = int((owner < 0).sum())
    slopes: dict[int, int] = {}
    for k in np.unique(owner[owner >= 0]).tolist():
        group = grouping.groups[k]
        hits = np.bincount(unit[owner == k], minlength=group.size)
        if group.frozen is not None:
            fixed += int(hits.sum())
        else:
            slopes[k] = sum(int(hits[cell[0]]) * group.quota(cell, group.granularity) for cell in group.cells)
    return fixed, slopes
