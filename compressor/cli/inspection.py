"""What `compressor inspect` shows of a model, as plain data and as tables."""

import io
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.layer_costs import macs_by_layer
from compressor.passes.tracing.trace import BATCH, DYNAMIC, INPUTS, UNUSED
from compressor.passes.transforms.merge_layers import merges_of
from compressor.runs.result import human
from compressor.values.plan import Structure


@dataclass(frozen=True)
class LayerInsight:
    """How the output channels of one layer may be pruned.

    Attributes:
        name: The layer.
        channels: How many outputs it has.
        state: `free`, `tied` or `frozen`.
        groups: The channel groups that its outputs belong to.
        tied_to: Other layers that make the same channels; they are pruned together.
        reason: Why its channels stay, if it is frozen.
        macs: Multiply-accumulates for one sample.
        removable: Share of them that the narrowest legal network does without.
    """

    name: str
    channels: int
    state: str
    groups: tuple[str, ...]
    tied_to: tuple[str, ...]
    reason: str | None
    macs: int
    removable: float


def layer_insights(channels: ChannelGraph) -> list[LayerInsight]:
    """One per layer that makes channels, in the order of the graph."""
    full, least = channels.full, narrowest(channels)
    macs, fewest = (channels.costs.by_layer([width for _, width in s.widths]) for s in (full, least))
    counts: dict[str, int] = {}
    for labels, layer in channels.walk.labeler.produced:
        counts.setdefault(layer, len(labels))
    insights = []
    for layer, count in counts.items():
        groups = [group for group in channels.groups if layer in group.layers]
        tied = tuple(dict.fromkeys(other for group in groups for other in group.layers if other != layer))
        reason = next((group.frozen for group in groups if group.frozen is not None), None)
        free = [group for group in groups if group.frozen is None]
        state = "frozen" if not free else "tied" if tied else "free"
        own = macs.get(layer, 0)
        insights.append(
            LayerInsight(
                name=layer,
                channels=count,
                state=state,
                groups=tuple(group.name for group in groups),
                tied_to=tied,
                reason=reason,
                macs=own,
                removable=1 - fewest.get(layer, 0) / own if own else 0.0,
            )
        )
    return insights


@dataclass(frozen=True)
class BranchInsight:
    """A branch that can be removed as a whole.

    Attributes:
        name: As plans name it.
        layers: The convolutions and linear layers in it.
        addition: Node of the addition behind it; of a gate, of the multiplication.
        gate: Whether it is a gate.
        inside: Branches within it.
        macs: Multiply-accumulates for one sample that go with it.
        params: Parameters that do.
    """

    name: str
    layers: tuple[str, ...]
    addition: str
    gate: bool
    inside: tuple[str, ...]
    macs: int
    params: int


def branch_insights(channels: ChannelGraph) -> list[BranchInsight]:
    """One per branch, in the order of the graph."""
    whole, known = channels.costs_of(channels.full), macs_by_layer(channels, channels.full)
    insights = []
    for branch in channels.branches:
        left = channels.costs_of(replace(channels.full, removed=(branch.name,)))
        layers = tuple(layer for layer in branch.layers if known.get(layer))
        macs, params = int(whole.macs[0] - left.macs[0]), int(whole.params[0] - left.params[0])
        insights.append(BranchInsight(branch.name, layers, branch.at, branch.gate, branch.inside, macs, params))
    return insights


def narrowest(channels: ChannelGraph) -> Structure:
    """The legal structure with the fewest channels."""
    return channels.nearest({group.name: 0 for group in channels.free})


def removable(channels: ChannelGraph) -> dict[str, float]:
    """Shares of the MACs, parameters and weight memory that the narrowest legal network does without."""
    costs = channels.costs(channels.widths([channels.full, narrowest(channels)]))
    pairs = {"macs": costs.macs, "params": costs.params, "memory": costs.memory_bytes}
    return {name: float(1 - values[1] / max(int(values[0]), 1)) for name, values in pairs.items()}


def inspection(channels: ChannelGraph) -> dict[str, object]:
    """Groups, layers, costs and what is frozen, as plain data."""
    costs = channels.costs(channels.widths([channels.full]))
    meta = channels.graph.meta
    return {
        "model": type(channels.graph).__name__,
        "inputs": [[list(shape), dtype] for shape, dtype in meta[INPUTS]],
        "dynamic_batch": bool(meta[DYNAMIC]),
        "digest": channels.digest,
        "macs": int(costs.macs[0]),
        "params": int(costs.params[0]),
        "memory_bytes": int(costs.memory_bytes[0]),
        "removable": removable(channels),
        "unknown_ops": list(channels.unknown),
        "unused_parameters": list(meta[UNUSED]),
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "granularity": group.granularity,
                "layers": list(group.layers),
                "readers": list(group.readers),
                "frozen": group.frozen,
                "lossy": list(group.lossy),
            }
            for group in channels.groups
        ],
        "layers": [asdict(insight) for insight in layer_insights(channels)],
        "branches": [asdict(insight) for insight in branch_insights(channels)],
        "merges": [asdict(merge) for merge in merges_of(channels.graph)],
    }


def inspection_table(channels: ChannelGraph) -> str:
    """The same for a terminal."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(_groups_table(channels))
    console.print(_layers_table(channels))
    if channels.branches:
        console.print(_branches_table(channels))
    costs = channels.costs(channels.widths([channels.full]))
    shares = removable(channels)
    lines = [
        "\n".join(line.rstrip() for line in console.export_text().splitlines()),
        f"{human(int(costs.macs[0]))} MACs, {human(int(costs.params[0]))} parameters, {human(int(costs.memory_bytes[0]), 'B')}",
        f"at the narrowest, {shares['macs']:.1%} of the MACs and {shares['params']:.1%} of the parameters are gone",
    ]
    lossy = tuple(dict.fromkeys(op for group in channels.free for op in group.lossy))
    if lossy:
        lines.append("computed over the channels that stay (lossy; --exact freezes them): " + _listed(lossy))
    if not channels.graph.meta[DYNAMIC]:
        lines.append(f"the batch size is fixed at {channels.graph.meta[BATCH]}: this model allows no other")
    if not channels.branches:
        lines.append("no branch can be removed as a whole: nothing here is added to a shortcut, and there is no gate")
    merges = merges_of(channels.graph)
    exact = [merge for merge in merges if not merge.reason]
    if merges:
        smaller = sum(merge.macs[1] < merge.macs[0] for merge in exact)
        lines.append(
            f"{len(merges)} pairs of layers have only an activation between them; without it {len(exact)} could become one layer "
            f"exactly, {smaller} of these with fewer MACs"
        )
    if channels.unknown:
        lines.append("ops without a rule, whatever they touch is frozen: " + ", ".join(channels.unknown))
    return "\n".join(lines)


def _groups_table(channels: ChannelGraph) -> Table:
    table = Table(title=f"{len(channels.groups)} channel groups, {len(channels.free)} free", title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("made by", overflow="fold", max_width=40)
    table.add_column("read by", overflow="fold", max_width=40)
    table.add_column("may be removed", overflow="fold", max_width=48)
    for group in channels.groups:
        free = "yes" if group.granularity == 1 else f"yes, {group.granularity} at a time (equal blocks)"
        state = free if group.frozen is None else f"no: {group.frozen}"
        table.add_row(group.name, str(group.size), _listed(group.layers), _listed(group.readers), state)
    return table


def _layers_table(channels: ChannelGraph) -> Table:
    insights = layer_insights(channels)
    total = max(sum(insight.macs for insight in insights), 1)
    counts = {state: sum(insight.state == state for insight in insights) for state in ("free", "tied", "frozen")}
    title = f"{len(insights)} layers: " + ", ".join(f"{count} {state}" for state, count in counts.items())
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("outputs", justify="right")
    table.add_column("MACs", justify="right")
    table.add_column("removable", justify="right")
    table.add_column("pruned", overflow="fold", max_width=80)
    for insight in insights:
        said = {"free": "freely", "tied": f"together with {_listed(insight.tied_to)}", "frozen": f"not: {insight.reason}"}[
            insight.state
        ]
        table.add_row(insight.name, str(insight.channels), f"{insight.macs / total:.1%}", f"{insight.removable:.0%}", said)
    return table


def _branches_table(channels: ChannelGraph) -> Table:
    total = max(int(channels.costs_of(channels.full).macs[0]), 1)
    table = Table(title=f"{len(channels.branches)} branches that can be removed as a whole", title_justify="left")
    table.add_column("branch", overflow="fold")
    table.add_column("how", overflow="fold")
    table.add_column("MACs", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("layers", overflow="fold", max_width=80)
    for insight in branch_insights(channels):
        how = "a gate" if insight.gate else "added"
        table.add_row(insight.name, how, f"{insight.macs / total:.1%}", human(insight.params), _listed(insight.layers))
    return table


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
