"""Deciding what stays: the plans of a run, each decided once and written down, and what measures their candidates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

from compressor.data.seeding import seeded
from compressor.errors import BudgetError
from compressor.methods import Problem
from compressor.methods.base import plans_of
from compressor.passes.channels.readers import biases_added
from compressor.passes.transforms.apply_plan import applied
from compressor.pipeline.member import Given, choices_of
from compressor.runtime.latency_model.model import Observation
from compressor.runtime.latency_model.single_layers import Choice
from compressor.runtime.measuring.measure import Comparison, measure
from compressor.values.budget import Budget, absolute
from compressor.values.files import digest_of_tensors, write_bytes
from compressor.values.measurement import Measurement
from compressor.values.plan import Plan, Structure, digest_of
from compressor.values.trial import Trial

_REACHED = "as far as the front goes"


class Planning:
    """The decisions of a run.

    Args:
        given: What the networks of the run have in common.
        budget: The one that was asked for; None where the method has a floor.
        budgets: The budget of each network.
        storage: Where studies and what was measured is kept for all who share it; None for the run's folder.
        cluster: Address of a Ray cluster that trains and measures candidates; None for this process.
    """

    def __init__(
        self, given: Given, budget: Budget | None, budgets: Sequence[Budget | None], storage: str | None, cluster: str | None
    ) -> None:
        self._given, self._budget, self._budgets, self._storage, self._cluster = given, budget, budgets, storage, cluster

    def plans(self) -> list[Plan]:
        """One plan for every budget; all of them are there, or none. A front ends where its budgets are out of reach."""
        run, budget = self._given.run, self._budget
        open_ended = budget is not None and (budget.front is not None or budget.drop is not None)
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

    def plan(self, k: int) -> Plan | None:
        """The plan of one budget; None where it is out of reach."""
        run = self._given.run
        file, step = run.member(k) / "plan.json", f"out of reach (member {k})"
        if run.intact(file):
            return Plan.load(file)
        if run.done(step) is None:
            try:
                return self._searched([k])[0]
            except BudgetError as error:
                run.finish(step, {"why": str(error)})
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
            given.run.finish(choices_of(k), {layer: asdict(choice) for layer, choice in found.items()})
        for k, plan in zip(members, plans, strict=True):
            file = given.run.member(k) / "plan.json"
            with given.run.writing(file):
                write_bytes(file, plan.to_json().encode())
        return plans

    def _once(self, name: str, work: Callable[[], dict[str, object]]) -> dict[str, object]:
        """Keeps what was measured: in the run's folder, or where all who share the storage find it."""
        if self._storage is None:
            return self._given.run.once(name, work)
        from compressor.search.storage import shared_once

        given = self._given
        digest = digest_of(
            [given.channels.digest, digest_of_tensors(given.original.state_dict()), given.target.to_dict(), given.seed]
        )
        return shared_once(self._storage, f"compressor-facts-{digest[:12]}", name, work)

    def _problem(self, gauge: "_Gauge", budget: Budget | None, choices: dict[str, Choice]) -> Problem:
        given = self._given

        def compared(found: Sequence[Choice]) -> None:
            choices.update({choice.layer: choice for choice in found})

        limits = budget.limits({**given.full_costs, "latency": 1.0}) if budget else {}
        if given.method.compensation is not None and given.images is not None:  # it may need room for biases
            added = biases_added(given.channels)
            if added and limits.keys() & {"params", "memory"}:
                given.progress.stage(f"room for {added:,} biases that compensation may add is kept within the budget")
            for name, size in (("params", 1), ("memory", next(given.original.parameters()).element_size())):
                if name in limits:
                    limits[name] -= added * size
        latency = budget.bounds.get("latency") if budget else None
        if isinstance(latency, str):  # absolute: as a fraction of what the original takes here and now
            original = self._once(
                "original latency",
                lambda: measure({"original": given.original}, given.target, given.seed)["original"].to_dict(),
            )
            limits["latency"] = absolute("latency", latency) / Measurement.from_dict(original).median_ms
        return Problem(
            channels=given.channels,
            limits=limits,
            target=given.target,
            measure=partial(self._trial, gauge),
            train=given.train,
            seed=given.seed,
            validate=given.validate,
            calibration=given.images,
            progress=given.progress,
            storage=self._storage or f"sqlite:///{given.run.path / 'study.db'}",
            alone=self._storage is None,  # who works in the folder of a run holds its lock
            cluster=self._cluster,
            observe=gauge.observe,
            once=self._once,
            compared=compared,
            distance=given.distance,
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
                device = cluster.RemoteDevice(self._cluster, given.channels, given.target, given.seed)
                yield _Gauge(device.trial, device.fingerprint(), device.observe)
                return
            if asked:
                given.progress.stage("no node of the cluster holds the target device: latency is measured here")
        with Comparison(given.original, given.target, given.seed) as comparison:

            def trial(plan: Plan) -> Trial:
                found, original = comparison.measure(applied(plan, given.channels))
                return Trial(given.channels.structure(plan), found, original)

            yield _Gauge(trial, given.target.fingerprint(), None)

    def _trial(self, gauge: "_Gauge", plan: Plan) -> Trial:
        structure = self._given.channels.structure(plan)
        trial = self._given.run.trial(structure, gauge.fingerprint, lambda: gauge.trial(plan))
        self._given.progress.stage(f"search: measured a candidate at {trial.ratio:.3f} of the original's latency")
        return trial


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
