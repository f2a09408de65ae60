"""One network of a family: from its plan to a finished, exported and measured result, step by step, none done twice."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, fx, nn

from compressor.errors import PassError
from compressor.methods import Method
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Repair
from compressor.passes.layers.product import take_state
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import Distance
from compressor.passes.tracing.network_file import network_bytes
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.passes.transforms.verify import verify_removal
from compressor.runs.folder import Run
from compressor.runs.result import Result, Step
from compressor.runtime.latency_model.single_layers import Choice
from compressor.runtime.measuring.measure import export_checked, measure
from compressor.tasks.samples import Samples
from compressor.training.by_function import Context, Recovery, Trained, train_by
from compressor.training.evaluate import evaluate, norms_of, recalibrate
from compressor.training.fine_tune import FineTune
from compressor.training.fine_tune import train as fine_tune
from compressor.training.mimic import Mimic, mimic
from compressor.values.budget import Budget
from compressor.values.files import load_tensors, save_tensors, write_bytes, write_json
from compressor.values.measurement import Measurement
from compressor.values.plan import Plan
from compressor.values.progress import Progress
from compressor.values.target import Target


@dataclass(frozen=True)
class Given:
    """What the networks of a family have in common; see `compress`.

    Attributes:
        original: The traced original, in eval mode.
        channels: Its analysis.
        run: The folder.
        train: With its task; or None.
        validate: What networks are judged on, with its task.
        test: With its task; or None.
        distance: How outputs are compared with the original's.
        images: For statistics; or None.
        target: Where it is to be fast.
        method: How the plans were made.
        finetune: Settings.
        seed: Of everything random.
        progress: Where to say what is being done.
    """

    original: fx.GraphModule
    channels: ChannelGraph
    run: Run
    train: Samples | None
    validate: Samples
    test: Samples | None
    distance: Distance
    images: Calibration | None
    target: Target
    method: Method
    finetune: Recovery
    seed: int
    progress: Progress

    @property
    def said(self) -> str:
        """What steps are named by that look at the metric."""
        return self.validate.task.metric.name

    @property
    def full_costs(self) -> dict[str, float]:
        """Costs of the original."""
        costs = self.channels.costs_of(self.channels.full)
        return {"macs": float(costs.macs[0]), "params": float(costs.params[0]), "memory": float(costs.memory_bytes[0])}

    def judged(self, step: str, graph: nn.Module, data: Samples | None = None) -> float:
        """The metric, recorded under the name of a step."""

        def work() -> dict[str, object]:
            self.progress.stage(step)
            found = evaluate(graph, self.validate if data is None else data, self.progress)
            return {"value": found.value, "count": found.count}

        found = self.run.once(step, work)
        return cast(float, found["value"] if "value" in found else found["percent"])  # as earlier versions wrote it


class Member:
    """One network of a family.

    Args:
        given: What all have in common.
        index: Its number.
        plan: What stays.
        budget: What it may cost; None where the method has a floor.
    """

    def __init__(self, given: Given, index: int, plan: Plan, budget: Budget | None) -> None:
        self._given, self._index, self._plan, self._budget = given, index, plan, budget
        self._folder = given.run.member(index)

    def _step(self, name: str) -> str:
        """What a step of this member is recorded as."""
        return name if self._index == 0 else f"{name} (member {self._index})"

    def _judged(self, name: str, graph: nn.Module) -> float:
        return self._given.judged(self._step(f"{self._given.said}: {name}"), graph)

    def result(self, original: float) -> Result:
        """Do what is not done yet; `original` is the metric of the original."""
        given, plan = self._given, self._plan
        judged = {"original": original}
        given.progress.stage(self._step("remove channels and check removed = masked"))
        graph = RemoveChannels(plan, given.channels)(given.original).graph
        checked = verify_removal(given.channels, plan, graph)
        judged["channels removed"] = self._judged("channels removed", graph)
        graph = self._repaired(graph, judged)
        if not isinstance(given.finetune, FineTune) or (given.train is not None and given.finetune.epochs):
            graph = self._trained(graph, judged)
        graph.eval()
        if not given.run.intact(self._finished()):
            self._finish(graph.state_dict())
        (self._folder / "compensated.safetensors").unlink(missing_ok=True)
        self._export(graph)
        before, after = self._measure(graph)
        return Result(
            graph=graph,
            plan=plan,
            steps=self._steps(judged, graph),
            original=before,
            compressed=after,
            budget=self._found(before, after, graph),
            test=self.tested(graph),
            test_metric=given.test.task.metric if given.test is not None else None,
            error=checked.relative_error,
            lossy=checked.lossy,
            frozen={g.name: g.frozen for g in given.channels.groups if g.frozen is not None},
            widths=self._widths(),
            repairs=self._repairs(),
            choices=self._choices(),
            path=self._folder,
            metric=given.validate.task.metric,
        )

    def _repaired(self, graph: fx.GraphModule, judged: dict[str, float]) -> fx.GraphModule:
        """Compensate, factorize, recalibrate: whichever of them there is to do."""
        given, run, factors = self._given, self._given.run, self._plan.factors
        settings, images = given.method.compensation, given.images
        to_fit = images is not None and (settings is not None or bool(norms_of(graph)))
        if not to_fit and not factors:
            return graph
        file = self._folder / "compensated.safetensors"
        if run.done(self._step("compensated")) is None or not (run.intact(file) or run.intact(self._finished())):
            repairs: tuple[Repair, ...] = ()
            if settings is not None and images is not None:
                given.progress.stage(self._step("compensate"))
                found = Compensate(given.channels, self._plan, images, settings, given.seed).run(graph)
                graph, repairs = found.graph, found.repairs
            graph = FactorizeConv(factors)(graph).graph
            if images is not None and norms_of(graph) and settings is None:
                given.progress.stage(self._step("recalibrate batch norms"))
                recalibrate(graph, [(batch, None) for batch in images.batches], len(images.batches), given.progress)
            with run.writing(file):
                save_tensors(file, graph.state_dict())
            run.finish(self._step("compensated"), {"layers": [asdict(repair) for repair in repairs]})
        else:
            graph = FactorizeConv(factors, weights=False)(graph).graph
            take_state(graph, load_tensors(file if file.exists() else self._finished()))
        name = "factorized" if not to_fit else "norms recalibrated" if settings is None else "compensated"
        judged[name] = self._judged(name, graph)
        return graph

    def _repairs(self) -> tuple[Repair, ...]:
        layers = cast(list[dict[str, Any]], (self._given.run.done(self._step("compensated")) or {}).get("layers", []))
        return tuple(Repair(**layer) for layer in layers)

    def _choices(self) -> tuple[Choice, ...]:
        found = self._given.run.done(choices_of(self._index)) or {}
        return tuple(Choice.of(cast(dict[str, Any], choice)) for choice in found.values())

    def _finished(self) -> Path:
        return self._folder / "weights.safetensors"

    def _finish(self, state: Mapping[str, Tensor]) -> None:
        with self._given.run.writing(self._finished()):
            save_tensors(self._finished(), state)

    def _trained(self, graph: fx.GraphModule, judged: dict[str, float]) -> fx.GraphModule:
        """Fine-tune with labels, or mimic features without; where that makes it worse, it stays as it was."""
        given, settings = self._given, self._given.finetune
        finished, name = self._finished(), "features mimicked" if isinstance(settings, Mimic) else "fine-tuned"
        earlier, before = list(judged.items())[-1]
        state = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
        if given.run.intact(finished):
            take_state(graph, load_tensors(finished))
        else:
            checkpoint = self._folder / "checkpoint.safetensors"
            if isinstance(settings, Mimic):
                given.progress.stage(self._step("mimic the original's features"))
                mimic(
                    graph,
                    given.channels,
                    self._plan,
                    cast(Calibration, given.images),
                    settings,
                    checkpoint,
                    given.seed,
                    given.progress,
                )
            elif isinstance(settings, FineTune):
                given.progress.stage(self._step("fine-tune"))
                teacher = given.original if settings.distillation else None
                fine_tune(graph, cast(Samples, given.train), settings, teacher, checkpoint, given.seed, given.progress)
            elif isinstance(settings, Trained):
                take_state(graph, settings.state)
            else:
                given.progress.stage(self._step("fine-tune by the function given"))
                train_by(settings, graph, self._context())
            self._finish(graph.state_dict())
            checkpoint.unlink(missing_ok=True)
        judged[name] = self._judged(name, graph)
        if given.validate.task.metric.lost(before, judged[name]) > 0:  # a short fine-tune can undo some of a good compensation
            judged[f"{earlier}, kept"] = before
            take_state(graph, state)
            self._finish(state)
        return graph

    def _context(self) -> Context:
        given = self._given
        folder = self._folder / "training"
        folder.mkdir(exist_ok=True)
        task = given.validate.task if given.train is None else given.train.task
        return Context(given.original, task, given.train, given.validate, folder, given.seed, given.progress)

    def _export(self, graph: fx.GraphModule) -> None:
        run, name = self._given.run, self._step("exported")
        model, network = self._folder / "model.onnx", self._folder / "network.safetensors"
        known = run.done(name)
        if known is not None and run.intact(model) and (known.get("no network file") or run.intact(network)):
            return
        self._given.progress.stage(self._step("export ONNX and check it against PyTorch"))
        with run.writing(model):
            error = export_checked(graph, model)
        result: dict[str, object] = {"onnx_relative_error": error}
        try:
            data = network_bytes(graph)
        except PassError as reason:  # it holds what no stranger's file may name
            result["no network file"] = str(reason)
            self._given.progress.stage(self._step(f"the network can be loaded with the model only: {reason}"))
        else:
            with run.writing(network):
                write_bytes(network, data)
        run.finish(name, result)

    def _measure(self, graph: fx.GraphModule) -> tuple[Measurement, Measurement]:
        given = self._given

        def work() -> dict[str, object]:
            given.progress.stage(self._step("measure original and result together"))
            found = measure({"original": given.original, "compressed": graph}, given.target, given.seed + 1)
            return {name: value.to_dict() for name, value in found.items()}

        found = given.run.once(self._step("measured"), work)
        original, compressed = (Measurement.from_dict(cast(Mapping[str, object], found[k])) for k in ("original", "compressed"))
        data = {"schema_version": 1, "original": original.to_dict(), "compressed": compressed.to_dict()}
        write_json(self._folder / "measurement.json", {**data, "ratio": compressed.ratio_to(original)})
        return original, compressed

    def tested(self, graph: fx.GraphModule) -> tuple[float, float] | None:
        """Metric of the original and of its network on the test data; None where there are none."""
        given = self._given
        if given.test is None:
            return None
        said = given.test.task.metric.name
        before = given.judged(f"{said}: test, original", given.original, given.test)
        return before, given.judged(self._step(f"{said}: test, result"), graph, given.test)

    def _steps(self, judged: Mapping[str, float], graph: nn.Module) -> tuple[Step, ...]:
        channels, structure = self._given.channels, self._given.channels.structure(self._plan)
        removed = channels.costs_of(replace(structure, ranks=()))
        known = {"original": channels.costs_of(channels.full), "channels removed": removed}
        after, steps = channels.costs_of(structure), []
        for name, metric in judged.items():
            costs = known.get(name, after)
            more, more_bytes = (0, 0) if name in known else self._added(graph)
            steps.append(
                Step(name, metric, int(costs.macs[0]), int(costs.params[0]) + more, int(costs.memory_bytes[0]) + more_bytes)
            )
        return tuple(steps)

    def _added(self, graph: nn.Module) -> tuple[int, int]:
        """Parameters and bytes of the biases that compensation gave to layers without one and without a norm behind them."""
        costs = self._given.channels.costs_of(self._given.channels.structure(self._plan))
        parameters = list(graph.parameters())
        more = sum(p.numel() for p in parameters) - int(costs.params[0])
        return more, more * parameters[0].element_size()

    def _found(self, original: Measurement, compressed: Measurement, graph: nn.Module) -> dict[str, tuple[float, float]]:
        limits = self._budget.limits({**self._given.full_costs, "latency": original.median_ms}) if self._budget else {}
        costs = self._given.channels.costs_of(self._given.channels.structure(self._plan))
        found = {
            "latency": compressed.median_ms,
            "macs": float(costs.macs[0]),
            "params": float(costs.params[0]) + self._added(graph)[0],
            "memory": float(costs.memory_bytes[0]) + self._added(graph)[1],
        }
        return {name: (found[name], limit) for name, limit in limits.items()}

    def _widths(self) -> dict[str, tuple[int, int]]:
        after = dict(self._given.channels.structure(self._plan).widths)
        return {g.name: (g.size, after[g.name]) for g in self._given.channels.groups}


def choices_of(index: int) -> str:
    """What the step is recorded as that holds what was measured of a member's factorized layers beside the plain ones."""
    return f"layers measured beside the plain ones (member {index})"
