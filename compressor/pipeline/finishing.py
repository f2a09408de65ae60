"""`finish`: a run's network comes back from training by other means, and is checked, judged, exported and measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from compressor.errors import DataError
from compressor.methods import Problem
from compressor.passes.fitting.settings import Compensation
from compressor.pipeline.compression import Compression
from compressor.runs.folder import read_checked
from compressor.runs.result import Result
from compressor.tasks.samples import Batches
from compressor.tasks.task import Task
from compressor.training.by_function import Trained
from compressor.values.budget import Budget
from compressor.values.checkpoints import weights_for
from compressor.values.files import check_finite, read_json, tensors_from
from compressor.values.plan import Plan
from compressor.values.progress import Progress
from compressor.values.target import Target

FINISHED = "finished"
"""Folder inside a run's."""


@dataclass(frozen=True)
class Decided:
    """A method that has decided: the plan of a run."""

    plan_of_run: Plan
    name: ClassVar[str] = "decided"
    compensation: ClassVar[Compensation | None] = None
    reduces_ranks: ClassVar[bool] = True
    floor: ClassVar[float] = 1.0  # of its own: no budget is needed

    def plan(self, problem: Problem) -> Plan:
        """What the run had decided."""
        del problem
        return self.plan_of_run

    def to_dict(self) -> dict[str, object]:
        """Name and plan as plain data."""
        return {"name": self.name, "plan": self.plan_of_run.digest}


def finish(
    folder: Path,
    trained: nn.Module,
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    validate: Batches | None,
    calibrate: Any,
    test: Batches | None,
    task: Task | None,
    seed: int,
    progress: Progress,
) -> Result:
    """See `compressor.finish`."""
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder} is no run: there is no run.json in it")
    plan = Plan.from_json(read_checked(folder / "plan.json").decode())
    config = cast("dict[str, Any]", read_json(folder / "run.json").get("config", {}))
    weights = tensors_from(read_checked(folder / "weights.safetensors"), folder / "weights.safetensors")
    found = weights_for(weights, trained.state_dict())
    missing = [name for name, tensor in weights.items() if found is None or _shape(found.tensors.get(name)) != tensor.shape]
    if found is None or missing:
        raise DataError(
            f"this is not the network of {folder}: `{missing[0]}` is missing or has another shape; train what compress returned as "
            "result.graph, or compressor.load(run)"
        )
    state = {name: found.tensors[name].detach().cpu() for name in weights}
    check_finite(state, "the trained network")
    target, budget = (_of(kind, config.get(name)) for kind, name in ((Target, "target"), (Budget, "budget")))
    return Compression(
        model, example_inputs, train=None, validate=validate, test=test, calibrate=calibrate, budget=_without_drop(budget),
        target=target or Target(), method=Decided(plan), finetune=Trained(state), out=folder / FINISHED, seed=seed,
        progress=progress, task=task, part=cast("str | None", config.get("part")),
    ).run()  # fmt: skip


def _shape(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.shape


def _of(kind: Any, fields: Any) -> Any:
    """A value from what a run wrote of it; None where that is nothing."""
    return kind(**fields) if fields else None


def _without_drop(budget: Budget | None) -> Budget | None:
    """Bounds of one network: those of families and of quality were met on the way."""
    if budget is None or budget.drop is not None or len(budget.members) > 1:
        return None
    return budget
