"""Plots of a report, as SVG texts."""

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compressor.runs.result import Result

_BEFORE, _AFTER, _OTHER = "#b8c0cc", "#2f6fb0", "#d98032"


def metric_against_latency(result: Result, tried: Sequence[float]) -> str:
    """Every step at its measured latency; the search's candidates as ticks on the axis.

    Args:
        result: The run's result.
        tried: Measured latencies of the search's candidates, in ms.
    """
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for step in result.steps if len(result.members) < 2 else result.steps[:1]:
        latency = result.latency_of(step)
        if latency is None:
            continue
        low, high = latency.interval_ms
        first = step is result.steps[0]
        error = [[latency.median_ms - low], [high - latency.median_ms]]
        colour = _OTHER if first else _AFTER
        axes.errorbar(latency.median_ms, step.metric, xerr=error, fmt="o", color=colour, capsize=3)
    if len(result.members) > 1:
        _front(axes, result)
    else:
        _name_steps(axes, result)
    if tried:
        axes.plot(tried, [0.0] * len(tried), "|", color="#666", markersize=12, transform=axes.get_xaxis_transform())
    axes.set_xlim(0, max([result.original.median_ms, *tried]) * 1.35)
    axes.set_xlabel("measured latency, ms (marks on the axis: candidates of the search)", fontsize=9)
    axes.set_ylabel(", ".join(filter(None, (result.metric.name, result.metric.unit))), fontsize=9)
    axes.grid(alpha=0.3)
    return svg_of(figure)


def _front(axes: Axes, result: Result) -> None:
    """The networks of a family, along their latencies; the one that was chosen filled."""
    members = sorted(result.members, key=lambda member: member.compressed.median_ms)
    points = [(member.compressed.median_ms, member.steps[-1].metric) for member in members]
    axes.plot(*zip(*points, strict=True), "-", color=_BEFORE, zorder=0)
    for member, (x, y) in zip(members, points, strict=True):
        low, high = member.compressed.interval_ms
        chosen = member.plan == result.plan
        axes.errorbar(x, y, xerr=[[x - low], [high - x]], fmt="o", color=_AFTER, mfc=_AFTER if chosen else "white", capsize=3)
        axes.annotate(f"{member.latency_ratio:.2f}", (x, y), xytext=(4, -12), textcoords="offset points", fontsize=8)
    axes.annotate("original", (result.original.median_ms, result.steps[0].metric), xytext=(8, -3), textcoords="offset points")


def _name_steps(axes: Axes, result: Result) -> None:
    """Write each step's name beside its point, pushed down where two would overlap."""
    gap = 0.055 * max(abs(step.metric) for step in result.steps)
    free_below: dict[float, float] = {}
    for step in sorted(result.steps, key=lambda step: -step.metric):
        latency = result.latency_of(step)
        if latency is None:
            continue
        x = latency.median_ms
        y = min(step.metric, free_below.get(x, step.metric))
        free_below[x] = y - gap
        text = f"{step.name} {result.metric.text(step.metric).removesuffix(' %')}"
        axes.annotate(text, (x, y), xytext=(10, -3), textcoords="offset points", fontsize=9)


def widths_per_group(result: Result) -> str:
    """Width of every group before and after."""
    names = list(result.widths)
    figure = Figure(figsize=(9.2, max(2.0, 0.19 * len(names) + 0.8)), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(names))
    axes.barh(rows, [result.widths[n][0] for n in names], color=_BEFORE, label="before", height=0.8)
    axes.barh(rows, [result.widths[n][1] for n in names], color=_AFTER, label="after", height=0.45)
    labels = [f"{name} (frozen)" if name in result.frozen else name for name in names]
    axes.set_yticks(list(rows), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("channels", fontsize=9)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """A figure as an SVG element."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compressor"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
