"""`Result`: what `compress` hands back."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import fx

from compressor.passes.fitting.settings import Repair
from compressor.runtime.latency_model.single_layers import Choice
from compressor.tasks.metric import Metric
from compressor.values.measurement import Measurement
from compressor.values.plan import Plan


@dataclass(frozen=True)
class Step:
    """The network after one step.

    Attributes:
        name: `original`, `channels removed`, `compensated`, `norms recalibrated` or `factorized`, `fine-tuned` or
            `features mimicked`. Layers are factorized behind `channels removed`, whatever the step after it is called. Where
            training made the metric worse, the network before it is the result: the last step is then `compensated, kept`.
        metric: Of the task, on the validation data.
        macs: Multiply-accumulates for one sample.
        params: Elements of all parameters.
        memory_bytes: Bytes of parameters and buffers.
    """

    name: str
    metric: float
    macs: int
    params: int
    memory_bytes: int


@dataclass(frozen=True)
class Result:
    """The outcome of a compression.

    Attributes:
        graph: The compressed network, in eval mode; trainable.
        plan: What was kept.
        steps: The network before and after each step.
        original: Measured latency of the original.
        compressed: Measured latency of the compressed network, same session.
        budget: Per bound: `(found, limit)`; latency in ms, memory in bytes, drop in points or the metric's unit.
        test: Metric of the original and of the result on the test data, where given.
        error: Relative difference between removing and masking, before any training.
        lossy: Ops over pruned channels for which the two differ by nature.
        frozen: Group name -> why it was left alone.
        widths: Group name -> (before, after).
        repairs: What compensation did to each layer.
        choices: What was measured of layers that were to be factorized, or to read through a gather, beside the plain ones;
            those that were not faster are plain in the result.
        metric: What networks are judged by; without labels it is their agreement with the original.
        path: Its folder: the run's, or that of a member of a family.
        test_metric: What `test` is; without labels for decisions it is another than `metric`.
        members: Where the budget was a list or a front, the networks for all of its values, in its order; this is the smallest of
            them. Where it was a drop, all that were made on the way; this is the fastest that loses no more.
    """

    graph: fx.GraphModule
    plan: Plan
    steps: tuple[Step, ...]
    original: Measurement
    compressed: Measurement
    budget: dict[str, tuple[float, float]]
    test: tuple[float, float] | None
    error: float
    lossy: tuple[str, ...]
    frozen: dict[str, str]
    widths: dict[str, tuple[int, int]]
    repairs: tuple[Repair, ...]
    path: Path
    metric: Metric
    members: tuple["Result", ...] = ()
    test_metric: Metric | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def latency_ratio(self) -> float:
        """Measured latency over the original's."""
        return self.compressed.ratio_to(self.original)

    @property
    def met(self) -> bool:
        """Whether every bound of the budget holds."""
        return all(found <= limit for found, limit in self.budget.values())

    def latency_of(self, step: Step) -> Measurement | None:
        """Measured latency of the network at a step; None where that structure was not measured.

        It depends on the structure alone.
        """
        if step is self.steps[0]:
            return self.original
        return None if self.plan.factors and step.name == "channels removed" else self.compressed

    def summary(self) -> str:
        """A table: metric, latency with its interval, MACs and parameters, before and after each step."""
        target = self.compressed.target
        title = f"{target['backend']}, batch {target['batch']}, {target.get('device', 'no device')}"
        table = Table(title=title, title_justify="left")
        for name in (
            "step",
            self.metric.heading.replace(" with the original", ""),
            "latency ms [95 %]",
            "of original",
            "MACs",
            "params",
            "memory",
        ):
            table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
        for step in self.steps:
            latency = self.latency_of(step)
            table.add_row(
                step.name,
                self.metric.text(step.metric).removesuffix(f" {self.metric.unit}"),
                *self._latency_cells(latency),
                human(step.macs),
                human(step.params),
                human(step.memory_bytes, "B"),
            )
        console = Console(width=130, record=True, force_terminal=False, file=io.StringIO())
        console.print(table)
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        for name, (found, limit) in self.budget.items():
            word = "met" if found <= limit else "MISSED"
            lines.append(
                f"budget {name}: {value_of(name, found, self.metric)} of at most {value_of(name, limit, self.metric)} ({word})"
            )
        if self.test is not None:
            metric = self.test_metric or self.metric
            lines.append(f"test data: {metric.text(self.test[0])} before, {metric.text(self.test[1])} after")
        if self.plan.removed:
            lines.append(f"{len(self.plan.removed)} branches removed: {', '.join(self.plan.removed)}")
        if self.plan.factors:
            forms = ", ".join(sorted({one.form for one in self.plan.factors}))
            lines.append(f"{len(self.plan.factors)} layers factorized ({forms})")
        slow = [choice.layer for choice in self.choices if not choice.faster]
        if slow:
            lines.append(f"{len(slow)} of {len(self.choices)} measured layers are not faster so and stay plain: {', '.join(slow)}")
        if len(self.members) > 1:
            which = "fastest within the drop" if "drop" in self.budget else "smallest"
            lines += ["", f"the family, the {which} of which this is:", *self._family()]
        lines.append(
            f"removed = masked within {self.error:.1e}" + (f"; lossy by nature: {', '.join(self.lossy)}" if self.lossy else "")
        )
        return "\n".join(lines)

    def _latency_cells(self, latency: Measurement | None) -> tuple[str, str]:
        if latency is None:
            return "-", "-"
        low, high = latency.interval_ms
        status = "" if latency.status == "ok" else f" {latency.status}"
        return f"{latency.median_ms:.3f} [{low:.3f}, {high:.3f}]{status}", f"{latency.ratio_to(self.original):.2f}"

    def _family(self) -> list[str]:
        lines = []
        for member in self.members:
            last, first = member.steps[-1], member.steps[0]
            asked = ", ".join(f"{name} {value_of(name, limit, self.metric)}" for name, (_, limit) in member.budget.items())
            word = "met" if member.met else "MISSED"
            numbers = f"latency {member.latency_ratio:.3f}, MACs {last.macs / first.macs:.3f}, {self.metric.text(last.metric)}"
            lines.append(f"  front/{member.path.name}: at most {asked} ({word}): {numbers}")
        return lines

    def point(self) -> dict[str, object]:
        """This network on a front: what it costs and how accurate it is."""
        first, last = self.steps[0], self.steps[-1]
        return {
            "folder": f"front/{self.path.name}", "latency_ms": self.compressed.median_ms, "latency_ratio": self.latency_ratio,
            "metric": last.metric, "metric_of_original": first.metric, "macs_ratio": last.macs / first.macs,
            "params_ratio": last.params / first.params, "met": self.met,
        }  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """The numbers as plain data (raw samples are in measurement.json)."""
        return {
            "metric": self.metric.to_dict(),
            "steps": [asdict(step) for step in self.steps],
            "latency_ms": {
                "original": self.original.median_ms,
                "compressed": self.compressed.median_ms,
                "ratio": self.latency_ratio,
                "status": [self.original.status, self.compressed.status],
            },
            "budget": {name: {"found": found, "limit": limit} for name, (found, limit) in self.budget.items()},
            "met": self.met,
            "test": list(self.test) if self.test is not None else None,
            "removed_masked_error": self.error,
            "lossy": list(self.lossy),
            "frozen": self.frozen,
            "repairs": [asdict(repair) for repair in self.repairs],
            "choices": [asdict(choice) for choice in self.choices],
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "removed": list(self.plan.removed),
            **({"front": [member.point() for member in self.members]} if len(self.members) > 1 else {}),
            "factors": {one.layer: {"form": one.form, "ranks": list(one.ranks)} for one in self.plan.factors},
        }


def human(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: 125486080 -> `125M`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}{unit}" if value / factor < 999.5 else f"{value / factor:.0f}{prefix}{unit}"
    return f"{value:.0f}{unit}"


def value_of(name: str, value: float, metric: Metric) -> str:
    """A bound of a budget, or what was found of it, with its unit; a drop is one of the metric."""
    if name == "drop":
        return f"{value:.2f} points" if metric.unit == "%" else metric.text(value)
    return f"{value:.3f} ms" if name == "latency" else human(value, "B" if name == "memory" else "")
