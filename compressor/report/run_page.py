"""The report page: tables and plots, no script, no file beside it."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import cast

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.layer_costs import macs_by_layer
from compressor.passes.fitting.settings import Repair
from compressor.report.plots import metric_against_latency, widths_per_group
from compressor.report.style import STYLE, table
from compressor.runs.folder import versions
from compressor.runs.result import Result, human, value_of
from compressor.values.measurement import CPU, Measurement

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>compressor: $title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>$style</style></head><body>
<h1>$title</h1>
<p class="lead">$lead</p>
<h2>Before and after each step</h2><div class="wide">$steps</div>
<p>$notes</p>
<h2>Budget</h2>$budget
$family
<h2>$metric against measured latency</h2>$scatter
<h2>Channels per group</h2>$widths
<h2>Cost per layer</h2><div class="wide">$layers</div>
$choices
$repairs
$frozen
<h2>Target and versions</h2>$environment
</body></html>
""")


def write_report(result: Result, channels: ChannelGraph, trials: Sequence[str]) -> str:
    """The page as a text.

    Args:
        result: The run's result.
        channels: Analysis of the original graph.
        trials: JSON of the measured candidates.
    """
    first, last = result.steps[0], result.steps[-1]
    name = type(channels.graph).__name__ or "network"
    lead = (
        f"{result.latency_ratio:.2f} of the latency, {last.macs / first.macs:.2f} of the MACs and "
        f"{last.params / first.params:.2f} of the parameters at {result.metric.text(last.metric)} {result.metric.name} "
        f"({_gained(result)})."
    )
    return _PAGE.substitute(
        style=STYLE,
        title=escape(f"{name}, compressed"),
        lead=escape(lead),
        metric=escape(result.metric.name[:1].upper() + result.metric.name[1:]),
        steps=_steps(result),
        notes=_notes(result),
        budget=_budget(result),
        family=_family(result),
        scatter=metric_against_latency(result, _tried(trials)),
        widths=widths_per_group(result),
        layers=_layers(result, channels),
        choices=_choices(result),
        repairs=_repairs(result),
        frozen=_frozen(result),
        environment=_environment(result.compressed.target),
    )


def _family(result: Result) -> str:
    """The networks for all values of a budget that was a list."""
    if len(result.members) < 2:
        return ""
    rows = []
    for member in result.members:
        first, last = member.steps[0], member.steps[-1]
        low, high = member.compressed.interval_ms
        rows.append([
            f"front/{member.path.name}", "met" if member.met else "missed", result.metric.text(last.metric),
            f"{member.compressed.median_ms:.3f} ms [{low:.3f}, {high:.3f}]", f"{member.latency_ratio:.3f}",
            f"{last.macs / first.macs:.3f}", f"{last.params / first.params:.3f}",
        ])  # fmt: skip
    header = ("member", "budget", result.metric.name, "latency (median)", "of original", "MACs", "parameters")
    return f'<h2>The family</h2><div class="wide">{table(header, rows)}</div>'


def _gained(result: Result) -> str:
    """By how much the metric is more than that of the original: `-0.43 points`."""
    gained, unit = result.steps[-1].metric - result.steps[0].metric, result.metric.unit
    return f"{gained:+.2f} {'points' if unit == '%' else unit}" if unit else f"{gained:+.4f}"


def _steps(result: Result) -> str:
    rows = []
    for step in result.steps:
        latency = result.latency_of(step)
        measured = ["not measured", "", ""]
        if latency is not None:
            low, high = latency.interval_ms
            measured = [f"{latency.median_ms:.3f} ms", f"{low:.3f} to {high:.3f}", f"{latency.ratio_to(result.original):.3f}"]
        rows.append([
            escape(step.name), result.metric.text(step.metric), *measured, human(step.macs), human(step.params),
            human(step.memory_bytes, "B"),
        ])  # fmt: skip
    header = ("step", result.metric.name, "latency (median)", "95 % interval", "of original", "MACs", "parameters", "memory")
    return table(header, rows)


def _notes(result: Result) -> str:
    notes = [f"Removing equals masking within a relative {result.error:.1e}, checked before any training."]
    if result.lossy:
        notes.append(f"By nature lossy: {', '.join(result.lossy)}.")
    for which, found in (("original", result.original), ("result", result.compressed)):
        if found.status != "ok":
            notes.append(f"The measurement of the {which} is {found.status}: {_why(found)}.")
    if result.test is not None:
        notes.append(f"Test data: {result.test[0]:.2f} % before, {result.test[1]:.2f} % after.")
    return escape(" ".join(notes))


def _why(found: Measurement) -> str:
    if found.clock == CPU:
        return (
            f"{found.details.get('disturbed')} of {len(found.times_ms)} samples were disturbed by other work, CPU times are shown"
        )
    warnings = found.details.get("warnings")
    said = [str(warning) for warning in warnings] if isinstance(warnings, list) else []
    return "; ".join([f"{found.discarded} samples were left out", *said])


def _budget(result: Result) -> str:
    rows = []
    for name, (found, limit) in result.budget.items():
        values = [value_of(name, v, result.metric) for v in (found, limit)]
        verdict = '<span class="met">met</span>' if found <= limit else '<span class="missed">missed</span>'
        rows.append([escape(name), *values, verdict])
    return table(("bound", "found", "at most", ""), rows)


def _layers(result: Result, channels: ChannelGraph) -> str:
    before, after = (macs_by_layer(channels, s) for s in (channels.full, channels.structure(result.plan)))
    gone = {layer: f"gone with {b.name}" for b in channels.branches if b.name in result.plan.removed for layer in b.layers}
    changes = {**_changes(result), **gone}
    rows = []
    for layer, macs in before.items():
        ratio = f"{after[layer] / macs:.2f}" if macs else ""
        rows.append([escape(layer), human(macs), human(after[layer]), ratio, changes.get(layer, "")])
    return table(("layer", "MACs before", "after", "ratio", ""), rows)


def _changes(result: Result) -> dict[str, str]:
    """What layers have become besides narrower, in words."""
    forms = {one.layer: f"{one.form} of rank {', '.join(map(str, one.ranks))}" for one in result.plan.factors}
    reads = {layer: f"reads {len(inputs)} inputs through a gather" for layer, inputs in result.plan.reads}
    return {layer: ", ".join(own[layer] for own in (forms, reads) if layer in own) for layer in {**forms, **reads}}


def _choices(result: Result) -> str:
    if not result.choices:
        return ""
    changes = _changes(result)
    rows = []
    for choice in result.choices:
        times = ["", ""] if choice.failure else [f"{ms:.4f} ms" for ms in (choice.dense_ms, choice.changed_ms)]
        rows.append([escape(choice.layer), *times, changes.get(choice.layer, "plain"), escape(choice.failure)])
    text = "<p>Each layer alone, as it was to be changed and as it would be plain at the same widths, in one session.</p>"
    header = ("layer", "plain", "changed", "chosen", "")
    return f'<h2>Accept only what is faster</h2>{text}<div class="wide">{table(header, rows)}</div>'


def _repairs(result: Result) -> str:
    if not result.repairs:
        return ""
    rows = []
    for repair in result.repairs:
        note = f"fitted in {repair.parts} parts, for memory" if repair.parts > 1 else ""
        rows.append(
            [escape(repair.layer), f"{repair.before:.4f}", f"{repair.after:.4f}", _held_out(repair), f"{repair.samples:,}", note]
        )
    header = ("layer", "error before", "after", "on unseen images", "patches", "")
    text = "<p>Mean square error of each layer's output against the original's, as a share of its variance.</p>"
    return f'<h2>Compensation</h2>{text}<div class="wide">{table(header, rows)}</div>'


def _held_out(repair: Repair) -> str:
    return "" if repair.held_out is None else f"{repair.held_out:.4f}"


def _frozen(result: Result) -> str:
    if not result.frozen:
        return ""
    rows = [[escape(name), escape(reason)] for name, reason in result.frozen.items()]
    return "<h2>Left alone, and why</h2>" + table(("group", "reason"), rows)


def _environment(target: Mapping[str, object]) -> str:
    rows = [[escape(str(k)), escape(str(v))] for k, v in {**target, **versions()}.items()]
    return table(("", ""), rows)


def _tried(trials: Sequence[str]) -> list[float]:
    found = [cast(dict[str, object], json.loads(text)) for text in trials]
    return [Measurement.from_dict(cast(dict[str, object], item["measurement"])).median_ms for item in found]
