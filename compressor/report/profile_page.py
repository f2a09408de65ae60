"""The page of a profile: latency against batch, time per layer, staircases; no script, no file beside it."""

from collections.abc import Sequence
from html import escape
from string import Template

from matplotlib.figure import Figure

from compressor.report.plots import svg_of
from compressor.report.style import STYLE, table
from compressor.runtime.latency_model.staircase import Staircase
from compressor.runtime.measuring.profile_records import Profiled

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>compressor profile: $title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>$style</style></head><body>
<h1>$title</h1>
<p class="lead">$lead</p>
<h2>Latency</h2><div class="wide">$latency</div>
$notes
<h2>Latency against batch</h2>$batches
$layers
$staircases
<h2>Target</h2>$environment
</body></html>
""")
_COLOURS = ("#2f6fb0", "#d98032", "#3a8f5c", "#8b5bb5")
_MOST_LAYERS = 40


def write_profile_page(title: str, found: Sequence[Profiled], staircases: Sequence[Staircase] = ()) -> str:
    """The page as a text.

    Args:
        title: Name of the network.
        found: What was profiled.
        staircases: Measured staircases, if any.
    """
    measured = [p for p in found if p.measurement is not None]
    return _PAGE.substitute(
        style=STYLE,
        title=escape(title),
        lead=escape(_lead(measured)),
        latency=table(_HEADER, [_row(p) for p in found]),
        notes=_notes(found),
        batches=_against_batch(measured) if measured else "<p>Nothing could be measured.</p>",
        layers="".join(_layers(p) for p in measured if p.layers),
        staircases="".join(_staircase(s) for s in staircases),
        environment=_environment(measured),
    )


_HEADER = [
    *("precision", "batch", "median ms", "95 % interval", "p90", "p99", "per second"),
    *("status", "accuracy", "error", "engine", "build s"),
]


def _row(found: Profiled) -> list[str]:
    start = [found.target.precision, str(found.target.batch)]
    m = found.measurement
    if m is None:
        return [*start, *["-"] * 5, f'<span class="missed">{escape(found.status)}</span>', *["-"] * 4]
    low, high = m.interval_ms
    tails = ["-" if (v := m.percentile_ms(q)) is None else f"{v:.3f}" for q in (90, 99)]
    status = "ok" if m.status == "ok" else f'<span class="missed">{escape(m.status)}</span>'
    accuracy = "-" if found.accuracy is None else f"{found.accuracy:.2f} %"
    error = "-" if found.parity is None else f"{found.parity:.1e}"
    size = f"{found.memory.get('engine_bytes', 0) / 1e6:.1f} MB"
    numbers = [f"{m.median_ms:.3f}", f"{low:.3f} to {high:.3f}", *tails, f"{found.throughput or 0:.0f}"]
    return [*start, *numbers, status, accuracy, error, size, f"{found.build_s:.1f}"]


def _lead(measured: Sequence[Profiled]) -> str:
    if not measured:
        return "Nothing could be measured."
    best = max(measured, key=lambda p: p.throughput or 0.0)
    least = min(measured, key=lambda p: p.measurement.median_ms if p.measurement else 0.0)
    assert least.measurement is not None
    return (
        f"Least latency {least.measurement.median_ms:.3f} ms ({least.target.precision}, batch {least.target.batch}); "
        f"most throughput {best.throughput or 0:.0f} per second ({best.target.precision}, batch {best.target.batch})."
    )


def _notes(found: Sequence[Profiled]) -> str:
    texts = []
    for p in found:
        name = f"{p.target.precision}, batch {p.target.batch}"
        seen = p.measurement.details.get("warnings") if p.measurement is not None else None
        said = [p.failure, *p.notes, *(seen if isinstance(seen, list) else [])]
        texts += [f"<li>{escape(name)}: {escape(str(note))}</li>" for note in said if note]
    return f"<ul>{''.join(texts)}</ul>" if texts else ""


def _against_batch(measured: Sequence[Profiled]) -> str:
    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for colour, precision in zip(_COLOURS, dict.fromkeys(p.target.precision for p in measured), strict=False):
        points = sorted((p.target.batch, p.measurement) for p in measured if p.target.precision == precision and p.measurement)
        medians = [m.median_ms for _, m in points]
        error = [[m.median_ms - m.interval_ms[0] for _, m in points], [m.interval_ms[1] - m.median_ms for _, m in points]]
        axes.errorbar([b for b, _ in points], medians, yerr=error, fmt="o-", color=colour, capsize=3, label=precision)
    axes.set_xlabel("batch", fontsize=9)
    axes.set_ylabel("median latency, ms", fontsize=9)
    axes.set_xticks(sorted({p.target.batch for p in measured}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return svg_of(figure)


def _layers(found: Profiled) -> str:
    layers = sorted(found.layers, key=lambda layer: -layer.median_ms)
    total = sum(layer.median_ms for layer in layers)
    shown = layers[:_MOST_LAYERS]
    figure = Figure(figsize=(9.2, 0.19 * len(shown) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), [layer.median_ms for layer in shown], color=_COLOURS[0], height=0.75)
    names = [f"{', '.join(layer.modules) or layer.name} ({layer.kind})" for layer in shown]
    axes.set_yticks(range(len(shown)), [n if len(n) < 64 else n[:61] + "…" for n in names], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("median time per run, ms", fontsize=9)
    assert found.measurement is not None
    rest = f", the {len(shown)} longest of {len(layers)}" if len(shown) < len(layers) else ""
    head = f"<h2>Time per layer: {escape(found.target.precision)}, batch {found.target.batch}</h2>"
    text = (
        f"<p>{len(layers)} layers{rest}. Their sum is {total:.3f} ms, the engine as a whole takes "
        f"{found.measurement.median_ms:.3f} ms: layers are timed one by one, which costs extra or hides overlap.</p>"
    )
    return head + text + svg_of(figure)


def _staircase(found: Staircase) -> str:
    figure = Figure(figsize=(6.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(found.widths, found.ms, ".-", color="#b8c0cc", label="measured")
    edges = [(w, ms) for w, ms in zip(found.widths, found.ms, strict=True) if w in found.edges]
    axes.plot([w for w, _ in edges], [ms for _, ms in edges], "o", color=_COLOURS[1], label="right edges")
    axes.set_xlabel("channels", fontsize=9)
    axes.set_ylabel("ms", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    text = f"<p>Timed: {escape(', '.join(found.layers))}. Worth having: {', '.join(map(str, found.edges))} channels.</p>"
    return f"<h2>Staircase of {escape(found.group)}</h2>{text}{svg_of(figure)}"


def _environment(measured: Sequence[Profiled]) -> str:
    if not measured or measured[0].measurement is None:
        return "<p>-</p>"
    target = {k: v for k, v in measured[0].measurement.target.items() if k not in ("batch", "precision")}
    return table(("", ""), [[escape(str(k)), escape(str(v))] for k, v in target.items()])
