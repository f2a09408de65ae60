"""What `compressor inspect` shows of a model, as plain data and as a table."""

import io

from rich.console import Console
from rich.table import Table

from compressor.passes.channels import ChannelGraph
from compressor.passes.trace import BATCH, DYNAMIC, INPUTS, UNUSED
from compressor.result import human


def inspection(channels: ChannelGraph) -> dict[str, object]:
    """Groups, costs and what is frozen, as plain data."""
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
    }


def inspection_table(channels: ChannelGraph) -> str:
    """The same for a terminal."""
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
    costs = channels.costs(channels.widths([channels.full]))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    lines = [
        "\n".join(line.rstrip() for line in console.export_text().splitlines()),
        f"{human(int(costs.macs[0]))} MACs, {human(int(costs.params[0]))} parameters, {human(int(costs.memory_bytes[0]), 'B')}",
    ]
    if not channels.graph.meta[DYNAMIC]:
        lines.append(f"the batch size is fixed at {channels.graph.meta[BATCH]}: this model allows no other")
    if channels.unknown:
        lines.append("ops without a rule, whatever they touch is frozen: " + ", ".join(channels.unknown))
    return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
