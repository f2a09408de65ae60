"""The main job, step by step: each step is recorded in the run's folder and never done twice."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.data.seeding import first_seen, seeded
from compressor.errors import BudgetError, DataError
from compressor.methods import CaP, Magnitude, Method, Problem, default_method
from compressor.methods.base import FamilyMethod
from compressor.passes.channels.analyze import ChannelGraph, analyze
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import Distance, SquaredError, default_distance, tells_classes
from compressor.passes.tracing.trace import INPUTS, is_traced, trace
from compressor.passes.tracing.training_outputs import other_in_training
from compressor.pipeline.member import Given, Member
from compressor.pipeline.part import Part
from compressor.pipeline.planning import Planning
from compressor.pipeline.quality import SHARES, fastest_within
from compressor.report import write_report
from compressor.runs.folder import Run
from compressor.runs.result import Result
from compressor.tasks.agreement import agreement
from compressor.tasks.classification import classification
from compressor.tasks.samples import Batches, Samples
from compressor.tasks.task import Task, first_of
from compressor.training.by_function import Recovery, described
from compressor.training.fine_tune import FineTune
from compressor.training.mimic import Mimic
from compressor.values.budget import FRONT, Budget
from compressor.values.files import check_finite, digest_of_tensors, have_to_be_finite, write_bytes, write_json
from compressor.values.loaders import guarded
from compressor.values.plan import Plan
from compressor.values.progress import Progress
from compressor.values.target import Target
from compressor.values.trial import Trial

logger = logging.getLogger(__name__)


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
        method: Method | None,
        finetune: Recovery,
        out: Path,
        seed: int,
        progress: Progress,
        storage: str | None = None,
        cluster: str | None = None,
        task: Task | None = None,
        part: str | None = None,
    ) -> None:
        if budget is None and getattr(method, "floor", None) is None:
            raise BudgetError("nothing says how far to go: pass budget=…, or a method with a floor such as CaP(floor=0.92)")
        self._calibrate = calibrate
        progress.stage("trace and analyze")
        if isinstance(model, nn.Module):
            _check_weights(model)
        self._part = Part(model, part, example_inputs) if part is not None else None
        traced = (model, example_inputs) if self._part is None else (self._part.module, self._part.example_inputs)
        self._original = trace(*traced).eval()
        self._channels: ChannelGraph = analyze(self._original)
        method = method or _default(self._channels, budget, target, images=train is not None or calibrate is not None)
        self._budget = budget
        self._budgets: tuple[Budget | None, ...] = budget.members if budget else (None,)
        if budget is not None and budget.drop is not None:  # a family's plans are made at once, others one by one
            shares = FRONT if isinstance(method, FamilyMethod) else SHARES
            self._budgets = tuple(replace(budget, drop=None, latency=share) for share in shares)
        if not self._channels.free and not method.reduces_ranks:
            reasons = "; ".join(f"{g.name}: {g.frozen}" for g in self._channels.groups[:5])
            raise BudgetError(f"nothing in this model can be removed ({reasons or 'it has no conv and no linear layer'})")
        config = {
            "model": self._channels.digest,
            "weights": digest_of_tensors(self._original.state_dict()),
            "inputs": [[list(shape), dtype] for shape, dtype in self._original.meta[INPUTS]],
            "budget": budget.to_dict() if budget else {},
            "target": target.to_dict(),
            "method": method.to_dict(),
            "finetune": described(finetune),
            "seed": seed,
            **({"task": task.to_dict()} if task is not None else {}),
            **({"part": part} if part is not None else {}),
        }
        trains = train is not None and isinstance(finetune, FineTune) and finetune.epochs > 0
        if self._part is None:
            self._check_outputs(model, example_inputs, task, validate is not None, trains, progress)
        meaning = task or classification()
        self._names = tuple(str(n.target) for n in self._original.graph.nodes if n.op == "placeholder")
        self._names = self._names if self._part is None else self._part.names

        def samples(batches: Batches | None) -> Samples | None:
            return None if batches is None else Samples(batches, meaning, self._names, self._part)

        images = self._calibration(train if calibrate is None else calibrate, meaning, method, seed)
        if images is None and isinstance(finetune, Mimic):
            raise DataError("there are no images to mimic the original's features on: pass train=… or calibrate=…")
        distance: Distance = SquaredError()  # of a part the features are compared
        if self._part is None:
            distance = default_distance(self._original) if task is None else task.distance(self._original)
        judged = samples(validate)
        if judged is None:
            judged, images = self._agreement(images, distance)
        self._labelled = validate is not None
        self._run = Run(out, config)
        self._given = Given(
            self._original, self._channels, self._run, samples(train), judged, samples(test), distance, images, target, method,
            finetune, seed, progress,
        )  # fmt: skip
        self._planning = Planning(self._given, budget, self._budgets, storage, cluster)

    def _check_outputs(
        self, model: nn.Module, inputs: Sequence[Tensor], task: Task | None, labelled: bool, trains: bool, progress: Progress
    ) -> None:
        """Refuse labels without a task for what is no classifier; say so where outputs are others in training mode."""
        if task is None and (labelled or trains) and not tells_classes(self._original):
            raise DataError(
                "the network's output is not that of a classifier, logits (N, classes) of two classes or more: say what it is for "
                "by task=… (compressor.tasks has segmentation, detection, image_to_image, …), or leave labels out and pass "
                "calibrate=…: it is then judged by its agreement with the original"
            )
        said = other_in_training(model, inputs) if trains and not is_traced(model) else None
        if said is not None:
            progress.stage(said)

    def _calibration(self, batches: Iterable[object] | None, task: Task, method: Method, seed: int) -> Calibration | None:
        """The images of the statistics: read once, in the order that the seed gives."""
        if batches is None:
            return None
        asked = [(method.compensation or Compensation()).images, getattr(getattr(method, "fitness", None), "images", 0)]
        with seeded(seed, batches):
            return Calibration.read(self._inputs(batches, task), self._original, max(asked))

    def _inputs(self, batches: Iterable[object], task: Task) -> Iterable[object]:
        """The network's inputs of batches that may be inputs alone."""
        for k, batch in enumerate(guarded(batches, "calibration")):
            inputs = batch if self._are_inputs(batch, task) else task.inputs_of(batch, self._names, k)
            yield from self._part.recorded([inputs]) if self._part is not None else [inputs]

    def _are_inputs(self, batch: object, task: Task) -> bool:
        """Whether a batch of `calibrate` is the network's inputs alone, which the task need not know how to find."""
        if isinstance(batch, Tensor):
            return self._calibrate is not None
        count = max(len(self._names), 1)
        if not isinstance(batch, list | tuple) or not all(isinstance(x, Tensor) for x in batch[:count]):
            return False
        begins = task.inputs is first_of and count > 1  # several inputs, and then labels
        return len(batch) >= count if begins else self._calibrate is not None and len(batch) == count

    def _agreement(self, images: Calibration | None, distance: Distance) -> tuple[Samples, Calibration]:
        """A fifth of the calibration images, with what the original says of them; and the others."""
        if images is None:
            raise DataError("there are no images: pass validate=… (with labels), or calibrate=… (without)")
        share = max(images.images // 5, 1)
        return agreement(self._original, images.first(share), distance), images.after(share)

    def run(self) -> Result:
        """Do what is not done yet."""
        with self._run:
            return self._result()

    def _result(self) -> Result:
        run = self._run
        self._check_data()
        original = self._given.judged(f"{self._given.said}: original", self._original)
        chosen, results = self._chosen(original)
        result = replace(chosen, path=run.path, members=tuple(results))
        self._given.progress.stage("report")
        write_json(run.path / "result.json", result.to_dict())
        trials = [path.read_text(encoding="utf-8") for path in sorted((run.path / "trials").glob("*.json"))]
        write_bytes(run.path / "report.html", write_report(result, self._channels, trials).encode())
        run.link_member(int(chosen.path.name))
        return result

    def _chosen(self, original: float) -> tuple[Result, list[Result]]:
        """The network that was asked for, and all that were made: of a family or a front the smallest is the one."""
        drop = self._budget.drop if self._budget is not None else None
        family = isinstance(self._given.method, FamilyMethod)
        plans = [] if drop is not None and not family else self._planning.plans()

        given = self._given if drop is None else replace(self._given, test=None)  # which is for the network that is chosen

        def finished(k: int, plan: Plan) -> Result:
            found = Member(given, k, plan, self._budgets[k]).result(original)
            write_json(self._run.member(k) / "result.json", found.to_dict())
            return found

        def attempt(k: int) -> Result | None:
            if family:
                return finished(k, plans[k]) if k < len(plans) else None
            plan = self._planning.plan(k)
            return finished(k, plan) if plan is not None else None

        if drop is not None:
            chosen, results = fastest_within(drop, original, len(self._budgets), attempt)
            k = int(chosen.path.name)
            return replace(chosen, test=Member(self._given, k, chosen.plan, self._budgets[k]).tested(chosen.graph)), results
        results = [finished(k, plan) for k, plan in enumerate(plans)]
        return min(results, key=lambda result: result.steps[-1].macs), results

    def _check_data(self) -> None:
        """Refuse a folder whose finished steps are of other data.

        Raises:
            DataError: The first batch of some loader is another than when the run began, though it is the same at each reading.
        """
        given = self._given
        loaders = {"train": given.train, "validate": given.validate if self._labelled else None, "calibrate": self._calibrate}

        def seen() -> dict[str, object]:
            return {name: first_seen(loader, given.seed) for name, loader in loaders.items() if loader is not None}

        now = seen()
        known = self._run.once("data", lambda: now)
        changed = [name for name in loaders if known.get(name) != now.get(name)]
        if changed and seen() == now:
            said = f"the first batch of {' and of '.join(changed)} is another"
            raise DataError(
                f"{self._run.path} holds a run on other data ({said}; a loader whose order changes from process to process looks "
                "like that, too); choose another output folder, or remove this one"
            )
        if changed:
            logger.warning("the images of %s are others at each reading: finished steps are taken as they are", ", ".join(changed))


def _default(channels: ChannelGraph, budget: Budget | None, target: Target, images: bool) -> Method:
    """The default method; of networks that it can do nothing with, or too little, the one that needs to know the least."""
    method = default_method(budget, images)
    if budget is None or not isinstance(method, CaP):
        return method
    problem = Problem(channels, {}, target, _unmeasured, None, 0)
    limits = budget.members[0].limits({**problem.costs(channels.full), "latency": 1.0})
    limits.pop("latency", None)
    try:
        method.check_possible(replace(problem, limits=limits))
    except BudgetError as error:
        logger.info("by default: magnitude (%s)", error)
        return Magnitude()
    return method


def _unmeasured(plan: Plan) -> Trial:
    raise AssertionError("what can be computed needs no measurement")


def _check_weights(model: nn.Module) -> None:
    """Refuse a model of another type than float32, or with weights that are no numbers.

    Raises:
        DataError: It is; the tensor is named.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.dtype is not torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise DataError(
                f"`{name}` is {kind}; networks are compressed in float32: pass model.float(), and ask for another precision by "
                "Target(precision=…)"
            )
    check_finite({name: tensor for name, tensor in have_to_be_finite(model).items() if not tensor.is_meta}, "the model")
