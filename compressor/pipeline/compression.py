"""The main job, step by step: each step is recorded in the run's folder and never done twice."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from compressor.data.batches import Batches
from compressor.data.seeding import first_seen, seeded
from compressor.errors import BudgetError, DataError
from compressor.methods import CaP, Magnitude, Method, Problem, default_method
from compressor.methods.base import FamilyMethod, plans_of
from compressor.passes.channels.analyze import ChannelGraph, analyze
from compressor.passes.channels.readers import biases_added
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.trace import INPUTS, device_of, outputs_of, trace
from compressor.passes.transforms.apply_plan import applied
from compressor.pipeline.member import Given, Member, choices_of
from compressor.pipeline.quality import SHARES, fastest_within
from compressor.report import write_report
from compressor.runs.folder import Run
from compressor.runs.result import Result
from compressor.runtime.latency_model.model import Observation
from compressor.runtime.latency_model.single_layers import Choice
from compressor.runtime.measuring.measure import Comparison, measure
from compressor.training.fine_tune import FineTune
from compressor.values.budget import FRONT, Budget, absolute
from compressor.values.files import check_finite, digest_of_tensors, have_to_be_finite, write_bytes, write_json
from compressor.values.measurement import Measurement
from compressor.values.plan import Plan, Structure, digest_of
from compressor.values.progress import Progress
from compressor.values.target import Target
from compressor.values.trial import Trial

logger = logging.getLogger(__name__)

_REACHED = "as far as the front goes"


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
        finetune: FineTune,
        out: Path,
        seed: int,
        progress: Progress,
        storage: str | None = None,
        cluster: str | None = None,
    ) -> None:
        if budget is None and getattr(method, "floor", None) is None:
            raise BudgetError("nothing says how far to go: pass budget=…, or a method with a floor such as CaP(floor=0.92)")
        self._storage, self._cluster, self._calibrate = storage, cluster, calibrate
        progress.stage("trace and analyze")
        if isinstance(model, nn.Module):
            _check_weights(model)
        self._original = trace(model, example_inputs).eval()
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
            "finetune": finetune.to_dict(),
            "seed": seed,
        }
        images = self._calibration(train if calibrate is None else calibrate, method, seed)
        labelled = validate is not None
        if validate is None:
            validate, images = self._agreement(images)
        self._run = Run(out, config)
        self._given = Given(
            self._original, self._channels, self._run, train, validate, labelled, test, images, target, method, finetune, seed,
            progress,
        )  # fmt: skip

    def _calibration(self, batches: Iterable[object] | None, method: Method, seed: int) -> Calibration | None:
        """The images of the statistics: read once, in the order that the seed gives."""
        if batches is None:
            return None
        asked = [(method.compensation or Compensation()).images, getattr(getattr(method, "fitness", None), "images", 0)]
        with seeded(seed, batches):
            return Calibration.read(batches, self._original, max(asked))

    def _agreement(self, images: Calibration | None) -> tuple[Batches, Calibration]:
        """A fifth of the calibration images, labelled by the original, and the others."""
        if images is None:
            raise DataError("there are no images: pass validate=… (with labels), or calibrate=… (without)")
        share = max(images.images // 5, 1)
        held, device = images.first(share), device_of(self._original)
        with torch.no_grad():
            outputs = [outputs_of(self._original(*[x.to(device) for x in batch]))[0] for batch in held.batches]
        labelled = [(batch[0], output.argmax(1).cpu()) for batch, output in zip(held.batches, outputs, strict=True)]
        return labelled, images.after(share)

    def run(self) -> Result:
        """Do what is not done yet."""
        with self._run:
            return self._result()

    def _result(self) -> Result:
        run = self._run
        self._check_data()
        original = self._given.accuracy("accuracy: original", self._original)
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
        plans = [] if drop is not None and not family else self._plans()

        given = self._given if drop is None else replace(self._given, test=None)  # which is for the network that is chosen

        def finished(k: int, plan: Plan) -> Result:
            found = Member(given, k, plan, self._budgets[k]).result(original)
            write_json(self._run.member(k) / "result.json", found.to_dict())
            return found

        def attempt(k: int) -> Result | None:
            if family:
                return finished(k, plans[k]) if k < len(plans) else None
            plan = self._plan(k)
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
        loaders = {"train": given.train, "validate": given.validate if given.labelled else None, "calibrate": self._calibrate}

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

    def _plans(self) -> list[Plan]:
        """One plan for every budget; all of them are there, or none. A front ends where its budgets are out of reach."""
        run, open_ended = self._run, self._budget is not None and (self._budget.front is not None or self._budget.drop is not None)
        count = int(cast(int, (run.done(_REACHED) or {}).get("budgets", len(self._budgets))))
        files = [run.member(k) / "plan.json" for k in range(len(self._budgets))]
        if all(run.intact(file) for file in files[:count]):
            return [Plan.load(file) for file in files[:count]]
        while True:
            try:
                plans = self._searched(range(count))
                break
            except BudgetError as error:
                if not open_ended or count == 1:
                    run.give_up(str(error))
                    raise
                count -= 1
                self._given.progress.stage(f"the front ends at its {count}. network: {error}")
        if open_ended:
            run.finish(_REACHED, {"budgets": count})
        return plans

    def _plan(self, k: int) -> Plan | None:
        """The plan of one budget; None where it is out of reach."""
        file, step = self._run.member(k) / "plan.json", f"out of reach (member {k})"
        if self._run.intact(file):
            return Plan.load(file)
        if self._run.done(step) is None:
            try:
                return self._searched([k])[0]
            except BudgetError as error:
                self._run.finish(step, {"why": str(error)})
        return None

    def _searched(self, members: Sequence[int]) -> list[Plan]:
        """The plans of some budgets, decided together and written down.

        Raises:
            BudgetError: One cannot be met.
        """
        given = self._given
        given.progress.stage(f"search: {given.method.name}")
        with seeded(given.seed, given.train, given.validate), self._gauge() as gauge:
            choices: list[dict[str, Choice]] = [{} for _ in members]
            problems = [self._problem(gauge, self._budgets[k], own) for k, own in zip(members, choices, strict=True)]
            plans = plans_of(given.method, problems)
        for k, found in zip(members, choices, strict=True):
            self._run.finish(choices_of(k), {layer: asdict(choice) for layer, choice in found.items()})
        for k, plan in zip(members, plans, strict=True):
            file = self._run.member(k) / "plan.json"
            with self._run.writing(file):
                write_bytes(file, plan.to_json().encode())
        return plans

    def _once(self, name: str, work: Callable[[], dict[str, object]]) -> dict[str, object]:
        """Keeps what was measured: in the run's folder, or where all who share the storage find it."""
        if self._storage is None:
            return self._run.once(name, work)
        from compressor.search.storage import shared_once

        given = self._given
        digest = digest_of(
            [self._channels.digest, digest_of_tensors(self._original.state_dict()), given.target.to_dict(), given.seed]
        )
        return shared_once(self._storage, f"compressor-facts-{digest[:12]}", name, work)

    def _problem(self, gauge: "_Gauge", budget: Budget | None, choices: dict[str, Choice]) -> Problem:
        given = self._given

        def compared(found: Sequence[Choice]) -> None:
            choices.update({choice.layer: choice for choice in found})

        limits = budget.limits({**given.full_costs, "latency": 1.0}) if budget else {}
        if given.method.compensation is not None and given.images is not None:  # it may need room for biases
            added = biases_added(self._channels)
            if added and limits.keys() & {"params", "memory"}:
                given.progress.stage(f"room for {added:,} biases that compensation may add is kept within the budget")
            for name, size in (("params", 1), ("memory", next(self._original.parameters()).element_size())):
                if name in limits:
                    limits[name] -= added * size
        latency = budget.bounds.get("latency") if budget else None
        if isinstance(latency, str):  # absolute: as a fraction of what the original takes here and now
            original = self._once(
                "original latency",
                lambda: measure({"original": self._original}, given.target, given.seed)["original"].to_dict(),
            )
            limits["latency"] = absolute("latency", latency) / Measurement.from_dict(original).median_ms
        return Problem(
            channels=self._channels,
            limits=limits,
            target=given.target,
            measure=partial(self._trial, gauge),
            train=given.train,
            seed=given.seed,
            validate=given.validate,
            calibration=given.images,
            progress=given.progress,
            storage=self._storage or f"sqlite:///{self._run.path / 'study.db'}",
            alone=self._storage is None,  # who works in the folder of a run holds its lock
            cluster=self._cluster,
            observe=gauge.observe,
            once=self._once,
            compared=compared,
        )

    @contextmanager
    def _gauge(self) -> Iterator["_Gauge"]:
        """What measures candidates: this process, or the node of the cluster that holds the target device."""
        given = self._given
        asked = any(budget is not None and "latency" in budget.bounds for budget in self._budgets)
        if self._cluster is not None:
            from compressor.search import cluster  # needs the package `ray`

            cluster.connect(self._cluster)  # that there is none is told before anything is computed
            if asked and cluster.has_device(self._cluster):
                device = cluster.RemoteDevice(self._cluster, self._channels, given.target, given.seed)
                yield _Gauge(device.trial, device.fingerprint(), device.observe)
                return
            if asked:
                given.progress.stage("no node of the cluster holds the target device: latency is measured here")
        with Comparison(self._original, given.target, given.seed) as comparison:

            def trial(plan: Plan) -> Trial:
                found, original = comparison.measure(applied(plan, self._channels))
                return Trial(self._channels.structure(plan), found, original)

            yield _Gauge(trial, given.target.fingerprint(), None)

    def _trial(self, gauge: "_Gauge", plan: Plan) -> Trial:
        structure = self._channels.structure(plan)
        trial = self._run.trial(structure, gauge.fingerprint, lambda: gauge.trial(plan))
        self._given.progress.stage(f"search: measured a candidate at {trial.ratio:.3f} of the original's latency")
        return trial


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


@dataclass(frozen=True)
class _Gauge:
    """Measures candidates.

    Attributes:
        trial: The network of a plan beside the original.
        fingerprint: Of the target, where it measures.
        observe: Structures, for a latency model; None for the usual way in this process.
    """

    trial: Callable[[Plan], Trial]
    fingerprint: Mapping[str, object]
    observe: Callable[[Sequence[Structure], float | None], list[Observation]] | None
