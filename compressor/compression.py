"""The main job, step by step: each step is recorded in the run's folder and never done twice."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.budget import Budget, absolute
from compressor.errors import BudgetError, DataError
from compressor.evaluate import Batches, device_of, evaluate, recalibrate
from compressor.measurement import Measurement
from compressor.methods import Method, Problem
from compressor.passes.calibration import Calibration
from compressor.passes.channels import ChannelGraph, analyze
from compressor.passes.compensate import Compensate
from compressor.passes.compensation import Compensation, Repair
from compressor.passes.products import take_state
from compressor.passes.remove_channels import RemoveChannels
from compressor.passes.trace import DYNAMIC, INPUTS, example_inputs_of, outputs_of, trace
from compressor.passes.verify import verify_removal
from compressor.plan import Plan
from compressor.progress import Progress
from compressor.report import write_report
from compressor.result import Result, Step
from compressor.run import Run
from compressor.runtime.latency import Comparison, export_checked, measure
from compressor.store import digest_of_tensors, load_tensors, replacing, save_tensors, write_bytes, write_json
from compressor.target import Target
from compressor.train import FineTune
from compressor.train import train as fine_tune
from compressor.trial import Trial


class Compression:
    """One call of `compress`; see there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Sequence[Tensor],
        *,
        train: Batches | None,
        validate: Batches | None,
        test: Batches | None,
        calibrate: Iterable[object] | None,
        budget: Budget | None,
        target: Target,
        method: Method,
        finetune: FineTune,
        out: Path,
        seed: int,
        progress: Progress,
    ) -> None:
        self._train, self._test = train, test
        self._calibrate = train if calibrate is None else calibrate
        self._budget, self._target, self._method = budget, target, method
        if budget is None and getattr(method, "floor", None) is None:
            raise BudgetError("nothing says how far to go: pass budget=…, or a method with a floor such as CaP(floor=0.92)")
        self._finetune, self._seed, self._progress = finetune, seed, progress
        progress.stage("trace and analyze")
        self._original = trace(model, example_inputs).eval()
        self._channels: ChannelGraph = analyze(self._original)
        if not self._channels.free:
            reasons = "; ".join(f"{g.name}: {g.frozen}" for g in self._channels.groups[:5])
            raise BudgetError(f"nothing in this model can be removed ({reasons or 'it has no conv and no linear layer'})")
        config = {
            "model": self._channels.digest,
            "weights": digest_of_tensors(self._original.state_dict()),
            "inputs": [[list(shape), dtype] for shape, dtype in self._original.meta[INPUTS]],
            "budget": budget.bounds if budget else {},
            "target": target.to_dict(),
            "method": method.to_dict(),
            "finetune": finetune.to_dict(),
            "seed": seed,
        }
        self._images = self._calibration()
        self._validate = self._agreement() if validate is None else validate
        self._labelled = validate is not None
        self._run = Run(out, config)

    def _calibration(self) -> Calibration | None:
        """The images of the statistics: read once, in the order that the seed gives."""
        if self._calibrate is None:
            return None
        settings = self._method.compensation or Compensation()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return Calibration.read(self._calibrate, self._original, settings.images)

    def _agreement(self) -> Batches:
        """A fifth of the calibration images, labelled by the original."""
        if self._images is None:
            raise DataError("there are no images: pass validate=… (with labels), or calibrate=… (without)")
        share = max(self._images.images // 5, 1)
        held, self._images = self._images.first(share), self._images.after(share)
        with torch.no_grad():
            device = device_of(self._original)
            outputs = [outputs_of(self._original(*[x.to(device) for x in batch]))[0] for batch in held.batches]
        return [(batch[0], output.argmax(1).cpu()) for batch, output in zip(held.batches, outputs, strict=True)]

    def run(self) -> Result:
        """Do what is not done yet."""
        with self._run:
            return self._result()

    def _result(self) -> Result:
        run = self._run
        accuracies = {"original": self._accuracy("original", self._original)}
        plan = self._plan()
        self._progress.stage("remove channels and check removed = masked")
        graph = RemoveChannels(plan, self._channels)(self._original).graph
        checked = verify_removal(self._channels, plan, graph)
        accuracies["channels removed"] = self._accuracy("channels removed", graph)
        graph = self._compensated(plan, graph, accuracies)
        if self._train is not None:
            graph = self._trained(graph, self._train, accuracies)
        graph.eval()
        if not self._finished().exists():
            save_tensors(self._finished(), graph.state_dict())
        (run.path / "compensated.safetensors").unlink(missing_ok=True)
        self._export(graph)
        original, compressed = self._measure(graph)
        result = Result(
            graph=graph,
            plan=plan,
            steps=self._steps(plan, accuracies, graph),
            original=original,
            compressed=compressed,
            budget=self._found(plan, original, compressed, graph),
            test=self._tested(graph),
            error=checked.relative_error,
            lossy=checked.lossy,
            frozen={g.name: g.frozen for g in self._channels.groups if g.frozen is not None},
            widths=self._widths(plan),
            repairs=self._repairs(),
            path=run.path,
            labelled=self._labelled,
        )
        self._progress.stage("report")
        write_json(run.path / "result.json", result.to_dict())
        trials = [path.read_text(encoding="utf-8") for path in sorted((run.path / "trials").glob("*.json"))]
        write_bytes(run.path / "report.html", write_report(result, self._channels, trials).encode())
        run.link_member()
        return result

    def _accuracy(self, name: str, graph: nn.Module, data: Batches | None = None) -> float:
        def work() -> dict[str, object]:
            self._progress.stage(f"accuracy: {name}")
            found = evaluate(graph, self._validate if data is None else data, self._progress)
            return {"percent": found.percent, "count": found.count}

        return cast(float, self._run.once(f"accuracy: {name}", work)["percent"])

    def _plan(self) -> Plan:
        file = self._run.member / "plan.json"
        if file.exists():
            return Plan.load(file)
        self._progress.stage(f"search: {self._method.name}")
        with torch.random.fork_rng(devices=[]), Comparison(self._original, self._target, self._seed) as comparison:
            torch.manual_seed(self._seed)
            plan = self._method.plan(self._problem(comparison))
        write_bytes(file, plan.to_json().encode())
        return plan

    def _problem(self, comparison: Comparison) -> Problem:
        limits = self._budget.limits({**self._full_costs(), "latency": 1.0}) if self._budget else {}
        latency = self._budget.latency if self._budget else None
        if isinstance(latency, str):  # absolute: as a fraction of what the original takes here and now
            original = self._run.once(
                "original latency", lambda: measure({"original": self._original}, self._target, self._seed)["original"].to_dict()
            )
            limits["latency"] = absolute("latency", latency) / Measurement.from_dict(original).median_ms
        return Problem(
            channels=self._channels,
            limits=limits,
            target=self._target,
            measure=partial(self._trial, comparison),
            train=self._train,
            seed=self._seed,
            validate=self._validate,
            calibration=self._images,
            progress=self._progress,
        )

    def _full_costs(self) -> dict[str, float]:
        costs = self._channels.costs(self._channels.widths([self._channels.full]))
        return {"macs": float(costs.macs[0]), "params": float(costs.params[0]), "memory": float(costs.memory_bytes[0])}

    def _trial(self, comparison: Comparison, plan: Plan) -> Trial:
        structure = self._channels.structure(plan)
        fingerprint = self._target.fingerprint()

        def work() -> Trial:
            found, original = comparison.measure(RemoveChannels(plan, self._channels)(self._original).graph)
            return Trial(structure, found, original)

        trial = self._run.trial(structure, fingerprint, work)
        self._progress.stage(f"search: measured a candidate at {trial.ratio:.3f} of the original's latency")
        return trial

    def _compensated(self, plan: Plan, graph: fx.GraphModule, accuracies: dict[str, float]) -> fx.GraphModule:
        settings, images = self._method.compensation, self._images
        if images is None:
            return graph
        file = self._run.path / "compensated.safetensors"
        if self._run.done("compensated") is None or not (file.exists() or self._finished().exists()):
            repairs: tuple[Repair, ...] = ()
            if settings is not None:
                self._progress.stage("compensate")
                found = Compensate(self._channels, plan, images, settings, self._seed).run(graph)
                graph, repairs = found.graph, found.repairs
            if settings is None or settings.recalibrate:
                self._progress.stage("recalibrate batch norms")
                pairs = [(batch[0], batch[0]) for batch in images.batches]
                recalibrate(graph, pairs, len(pairs), self._progress)
            save_tensors(file, graph.state_dict())
            self._run.finish("compensated", {"layers": [asdict(repair) for repair in repairs]})
        else:
            take_state(graph, load_tensors(file if file.exists() else self._finished()))
        name = "norms recalibrated" if settings is None else "compensated"
        accuracies[name] = self._accuracy(name, graph)
        return graph

    def _repairs(self) -> tuple[Repair, ...]:
        layers = cast(list[dict[str, Any]], (self._run.done("compensated") or {}).get("layers", []))
        return tuple(Repair(**layer) for layer in layers)

    def _finished(self) -> Path:
        return self._run.member / "weights.safetensors"

    def _trained(self, graph: fx.GraphModule, train: Batches, accuracies: dict[str, float]) -> fx.GraphModule:
        if not self._finetune.epochs:
            return graph
        finished = self._finished()
        if finished.exists():
            take_state(graph, load_tensors(finished))
        else:
            self._progress.stage("fine-tune")
            teacher = self._original if self._finetune.distillation else None
            checkpoint = self._run.path / "checkpoint.safetensors"
            fine_tune(graph, train, self._finetune, teacher, checkpoint, self._seed, self._progress)
            save_tensors(finished, graph.state_dict())
            checkpoint.unlink(missing_ok=True)
        accuracies["fine-tuned"] = self._accuracy("fine-tuned", graph)
        return graph

    def _export(self, graph: fx.GraphModule) -> None:
        member = self._run.member
        if self._run.done("exported") is None:
            self._progress.stage("export ONNX and check it against PyTorch")
            error = export_checked(graph, member / "model.onnx")
            save_program(graph, member / "program.pt2")
            self._run.finish("exported", {"onnx_relative_error": error})

    def _measure(self, graph: fx.GraphModule) -> tuple[Measurement, Measurement]:
        def work() -> dict[str, object]:
            self._progress.stage("measure original and result together")
            found = measure({"original": self._original, "compressed": graph}, self._target, self._seed + 1)
            return {name: value.to_dict() for name, value in found.items()}

        found = self._run.once("measured", work)
        original, compressed = (Measurement.from_dict(cast(Mapping[str, object], found[k])) for k in ("original", "compressed"))
        data = {"schema_version": 1, "original": original.to_dict(), "compressed": compressed.to_dict()}
        write_json(self._run.member / "measurement.json", {**data, "ratio": compressed.ratio_to(original)})
        return original, compressed

    def _tested(self, graph: fx.GraphModule) -> tuple[float, float] | None:
        if self._test is None:
            return None
        before = self._accuracy("test, original", self._original, self._test)
        return before, self._accuracy("test, result", graph, self._test)

    def _steps(self, plan: Plan, accuracies: Mapping[str, float], graph: nn.Module) -> tuple[Step, ...]:
        before, after = (self._channels.costs_of(s) for s in (self._channels.full, self._channels.structure(plan)))
        steps = []
        for name, accuracy in accuracies.items():
            found = before if name == "original" else after
            more, more_bytes = (0, 0) if name in ("original", "channels removed") else self._added(graph)
            steps.append(
                Step(name, accuracy, int(found.macs[0]), int(found.params[0]) + more, int(found.memory_bytes[0]) + more_bytes)
            )
        return tuple(steps)

    def _added(self, graph: nn.Module) -> tuple[int, int]:
        """Parameters and bytes of the biases that compensation gave to layers without one and without a norm behind them."""
        before = self._original.state_dict()
        biases = [tensor for name, tensor in graph.named_parameters() if name not in before]
        return sum(b.numel() for b in biases), sum(b.numel() * b.element_size() for b in biases)

    def _found(
        self, plan: Plan, original: Measurement, compressed: Measurement, graph: nn.Module
    ) -> dict[str, tuple[float, float]]:
        limits = self._budget.limits({**self._full_costs(), "latency": original.median_ms}) if self._budget else {}
        costs = self._channels.costs_of(self._channels.structure(plan))
        found = {
            "latency": compressed.median_ms,
            "macs": float(costs.macs[0]),
            "params": float(costs.params[0]) + self._added(graph)[0],
            "memory": float(costs.memory_bytes[0]) + self._added(graph)[1],
        }
        return {name: (found[name], limit) for name, limit in limits.items()}

    def _widths(self, plan: Plan) -> dict[str, tuple[int, int]]:
        after = dict(self._channels.structure(plan).widths)
        return {g.name: (g.size, after[g.name]) for g in self._channels.groups}


def save_program(graph: fx.GraphModule, path: Path) -> None:
    """Write a graph as an exported program (`.pt2`), whole or not at all."""
    example = example_inputs_of(graph, 2 if graph.meta[DYNAMIC] else None)
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 20)},) * len(example) if graph.meta[DYNAMIC] else None
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, temporary)
