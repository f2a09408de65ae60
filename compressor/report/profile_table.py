"""A profile as a table for the terminal."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from compressor.runtime.latency_model.staircase import Staircase
from compressor.runtime.measuring.profile_records import Profiled


def profile_table(found: Sequence[Profiled], stairs: Sequence[Staircase]) -> str:
    """The table as a text, with what went wrong below it."""
    table = Table()
    for name in ("precision", "batch", "median ms", "95 % interval", "p90", "p99", "per second", "accuracy", "error", "status"):
        table.add_column(name, justify="left" if name in ("precision", "status") else "right", no_wrap=True)
    for p in found:
        m = p.measurement
        if m is None:
            table.add_row(p.target.precision, str(p.target.batch), *["-"] * 7, p.status)
            continue
        tails = ["-" if (v := m.percentile_ms(q)) is None else f"{v:.3f}" for q in (90, 99)]
        low, high = m.interval_ms
        accuracy = "-" if p.accuracy is None else f"{p.accuracy:.2f} %"
        error = "-" if p.parity is None else f"{p.parity:.1e}"
        numbers = [f"{m.median_ms:.3f}", f"{low:.3f} to {high:.3f}", *tails, f"{p.throughput or 0:.0f}", accuracy, error]
        table.add_row(p.target.precision, str(p.target.batch), *numbers, m.status)
    console = Console(width=140, record=True, force_terminal=False, file=io.StringIO())
    console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    lines += [f"{p.target.precision}, batch {p.target.batch}: {note}" for p in found for note in [p.failure, *p.notes] if note]
    for p in found:
        seen = p.measurement.details.get("warnings") if p.measurement is not None else None
        lines += [f"{p.target.precision}, batch {p.target.batch}: {w}" for w in seen] if isinstance(seen, list) else []
    lines += [_layer_lines(p) for p in found if p.layers]
    lines += [f"staircase of {s.group} ({', '.join(s.layers)}): worth having are {', '.join(map(str, s.edges))}" for s in stairs]
    return "\n".join(lines)


def _layer_lines(found: Profiled) -> str:
    total = sum(layer.median_ms for layer in found.layers) or 1.0
    longest = sorted(found.layers, key=lambda layer: -layer.median_ms)[:10]
    lines = [f"layers, {found.target.precision}, batch {found.target.batch} ({len(longest)} longest of {len(found.layers)}):"]
    for layer in longest:
        name = ", ".join(layer.modules) or layer.name
        lines.append(f"  {layer.median_ms:9.4f} ms {100 * layer.median_ms / total:5.1f} %  {layer.kind:16s} {name}")
    return "\n".join(lines)
