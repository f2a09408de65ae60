"""What the methods that search have in common: a study over parameters that stand for plans, judged on a hold-out."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from compressor.errors import BackendError, BudgetError, DataError
from compressor.methods.base import MethodSettings, Problem, Space
from compressor.methods.searching.final_plan import row_of
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.paths import Rows, Widths
from compressor.passes.channels.search_space import depth_of, ranks_of
from compressor.passes.fitting.settings import Compensation
from compressor.passes.tracing.trace import DYNAMIC
from compressor.search.execution import Executor, Here
from compressor.search.fitness import Fitness, Judge, Worth, samples
from compressor.search.samplers import RIVALS
from compressor.search.storage import claim, is_gone, is_mine
from compressor.search.study import OUTCOME, Job, Search
from compressor.tasks.samples import Sample, tensors_of
from compressor.values.files import digest_of_tensors
from compressor.values.plan import Plan, digest_of
from compressor.values.settings import check

logger = logging.getLogger(__name__)

_RANGES = {
    "trials": (1, math.inf), "parallel": (1, math.inf), "engines": (6, math.inf), "leaders": (1, math.inf), "probes": (1, math.inf),
}  # fmt: skip
_LEADER = "leader:"  # user attributes of a study: what was measured after so many trials
_MEASURING = "measuring:"  # and by whom it is being measured


@dataclass(frozen=True)
class SearchingMethod(MethodSettings):
    """Base of methods that search: how candidates are proposed, judged and measured.

    Attributes:
        trials: How many candidates are judged, those of the first population among them.
        fitness: How they are judged.
        sampler: Who proposes them: the method's own (its name), or one of Optuna's: `tpe`, `cmaes`, `nsgaii`, `random`.
        parallel: How many are under way at once. The search depends on this number, not on where they run.
        engines: Engines that the latency model begins with, where the budget is a latency.
        leaders: After so many trials the best is built and measured, and the latency model learns from it.
        space: What is searched: `channels`, `ranks` (of layers that become sequences, by a truncated SVD) and `depth` (branches as
            a whole), or several of these, joined by `+`.
        accept: Whether sequences of the result have to be faster on the target; `None`: where the budget is a latency.
        probes: Images that the sensitivities of groups are measured on, where channels are ranked by loss.
        compensation: How the network is repaired in the end.

    Raises:
        BudgetError: A setting is out of range.
    """

    trials: int = 400
    fitness: Fitness = field(default_factory=lambda: Fitness("compensate"))
    sampler: str = "random"
    parallel: int = 1
    engines: int = 24
    leaders: int = 20
    space: Space = "channels"
    accept: bool | None = None
    probes: int = 256
    compensation: Compensation | None = field(default_factory=Compensation)

    distinct: ClassVar[bool] = False
    """Whether a candidate is drawn anew where it stands for a network that was judged before. Not as published."""

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, _RANGES, {"sampler": (self.name, *RIVALS)})
        try:
            self.own_sampler(0)
        except ValueError as error:
            raise BudgetError(str(error)) from error

    def own_sampler(self, seed: int, **more: Any) -> BaseSampler:
        """The sampler that the method was published with, by its settings and what else it takes.

        Raises:
            ValueError: A setting is out of range.
        """
        raise NotImplementedError

    def spaced(self, problem: Problem) -> Problem:
        """The problem with the axes that are searched."""
        return problem.over("ranks" in self.parts, "depth" in self.parts)

    @property
    def parts(self) -> frozenset[str]:
        """Of the space."""
        return frozenset(self.space.split("+"))

    def searched(self, problem: Problem) -> frozenset[str]:
        """Names of the groups, ranks and branches of a spaced problem that the space has."""
        axes = {axis.name for axis in (*ranks_of(problem.channels), *depth_of(problem.channels))}
        return frozenset(group.name for group in problem.channels.groups if "channels" in self.parts or group.name in axes)

    @property
    def deciding(self) -> dict[str, object]:
        """The settings that decide what a trial is worth, as plain data."""
        return {key: value for key, value in self.to_dict().items() if key not in ("parallel", "accept")}

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return self.space != "channels"


@dataclass(frozen=True)
class Quest:
    """One search.

    Attributes:
        space: Parameter name -> distribution.
        own: The method's own sampler; Optuna's are there for every space.
        row: From parameters and the index of a trial, the structure (groups,) that they stand for.
        widths: From parameters, the plans of structures.
    """

    space: Mapping[str, BaseDistribution]
    own: BaseSampler
    row: Callable[[Mapping[str, Any], int], Rows]
    widths: Callable[[Mapping[str, Any]], Widths]


def search(problem: Problem, method: SearchingMethod, quest: Quest, affordable: Affordable) -> list[FrozenTrial]:
    """Do the trials that are not done yet; all good ones, best first.

    Raises:
        DataError: Data that the fitness needs are not there.
    """
    if not quest.space:
        raise BudgetError(f"{method.name}: no group of this network has more than one legal width")

    def decode(params: Mapping[str, Any], index: int) -> dict[str, Any]:
        row = quest.row(params, index)
        if depth_of(problem.channels):  # what a branch that is gone holds has no meaning: one network, one structure
            row = problem.channels.widths([problem.channels.structure_of(row)])[0]
        return {"widths": row.tolist(), "digest": _judged_as(quest.widths(params).plan(row))}

    def task(params: Mapping[str, Any], structure: Mapping[str, Any]) -> Plan:
        return quest.widths(params).plan(np.array(structure["widths"], dtype=np.int64))

    def value(worth: Worth) -> tuple[float, dict[str, Any]]:
        return worth.loss if worth.metric is None else worth.metric, asdict(worth)

    def sampler(index: int) -> BaseSampler:
        if method.sampler == method.name:
            return quest.own
        return RIVALS[method.sampler]((problem.seed * 1_000_003 + index) % 2**32)

    budget = ", ".join(f"{name} {limit:.3g}" for name, limit in problem.limits.items())
    graph = problem.channels.graph
    holdout, train = samples(method.fitness, problem.validate, problem.train, problem.seed, not graph.meta[DYNAMIC])
    question = digest_of([
        problem.channels.digest, digest_of_tensors(graph.state_dict()), method.deciding, dict(problem.limits),
        problem.target.to_dict(), problem.seed, {name: str(d) for name, d in quest.space.items()},
    ])  # fmt: skip
    by = holdout[0].task.metric if method.fitness.objective == "metric" else None
    digest = digest_of([question, _digest(problem, holdout, train)])
    job = Job(
        name=f"{method.name}-{digest[:12]}",
        digest=digest,
        question=question,
        space=quest.space,
        sampler=sampler,
        direction="maximize" if by is not None and by.higher_is_better else "minimize",
        trials=method.trials,
        parallel=method.parallel,
        decode=decode,
        task=task,
        value=value,
        budget=budget,
        unit="loss" if by is None else by.heading,
        distinct=method.distinct,
    )
    problem.progress.stage(f"{method.name}: {method.trials} candidates, proposed by {method.sampler}")
    with executor_of(problem, method, holdout, train) as executor:
        running = Search(job, executor, problem.storage, problem.progress, problem.alone)
        leaders = _Leaders(running, method, affordable)
        running.after = leaders
        found = running.run()
        leaders.catch_up()  # with those that other processes have measured since the last trial of this one
    if not found:
        raise DataError(f"{method.name}: not one of {method.trials} candidates could be judged; the study holds the reasons")
    within = affordable.within(np.stack([row_of(trial) for trial in found]))
    return [t for t, good in zip(found, within, strict=True) if good] or found  # by the model as it is in the end


def _judged_as(plan: Plan) -> str:
    """What a network is told by; without branches that are gone the same as ever, so that studies go on."""
    return digest_of([dict(plan.kept), list(plan.removed)] if plan.removed else dict(plan.kept))


class _Leaders:
    """Builds and measures the best candidate from time to time, and lets the latency model know."""

    def __init__(self, running: Search[Plan, Worth], method: SearchingMethod, affordable: Affordable) -> None:
        self._running, self._method, self._affordable = running, method, affordable
        self._learnt: set[str] = set()

    def catch_up(self) -> dict[str, Any]:
        """Learn what the study holds; its attributes."""
        attributes = self._running.study.user_attrs
        known = {name for name in attributes if name.startswith(_LEADER)}
        for name in sorted(known - self._learnt, key=lambda name: int(name.removeprefix(_LEADER))):
            self._learn(name, attributes[name])
        return attributes

    def __call__(self, finished: int) -> None:
        if self._affordable.model is None:
            return
        study, attributes = self._running.study, self.catch_up()
        known = [name for name in attributes if name.startswith(_LEADER)]
        due = finished // self._method.leaders * self._method.leaders
        if not due or f"{_LEADER}{due}" in attributes or self._taken(attributes.get(f"{_MEASURING}{due}")):
            return
        study.set_user_attr(f"{_MEASURING}{due}", claim())
        records = [attributes[name] for name in known]
        measured = [[own.get("widths"), own.get("ranks", {}), own.get("removed", [])] for own in records]
        record = self._measured(due, measured)
        study.set_user_attr(f"{_LEADER}{due}", record)
        self._learn(f"{_LEADER}{due}", record)

    def _taken(self, who: Mapping[str, Any] | None) -> bool:
        """Whether another process is measuring it, which would be slower beside us: what it finds is learnt when it is done."""
        return not (who is None or self._affordable.problem.alone or is_mine(who) or is_gone(who))

    def _learn(self, name: str, record: Mapping[str, object]) -> None:
        self._learnt.add(name)
        if "median_ms" in record:
            self._affordable.learn(record)

    def _measured(self, due: int, known: Sequence[object]) -> dict[str, object]:
        """The best of the first so many trials that is within the limits by the model as it is, and was not measured before."""
        sign = -1 if self._running.study.direction == StudyDirection.MAXIMIZE else 1
        good = [t for t in self._running.finished()[:due] if t.state == TrialState.COMPLETE]
        good.sort(key=lambda t: (sign * float(t.value or 0.0), t.number))
        rows = [row_of(trial) for trial in good]
        if not rows:
            return {}
        within = self._affordable.within(np.stack(rows))
        for k in sorted(range(len(rows)), key=lambda k: not within[k]):
            structure = self._affordable.problem.channels.structure_of(rows[k])
            axes: dict[str, object] = {"ranks": dict(structure.ranks), "removed": list(structure.removed)}
            own: dict[str, object] = {"widths": dict(structure.widths), **axes}
            if list(own.values()) not in known:
                break
        else:
            return {}
        try:
            return self._affordable.measured(structure) or {**own, "failure": "its engine cannot be built"}
        except BackendError as error:
            logger.warning("a leader cannot be measured: %s", error)
            return {**own, "failure": str(error)}


def executor_of(problem: Problem, method: SearchingMethod, holdout: Sequence[Sample], train: Sequence[Sample]) -> "_Closing":
    """Where a problem's candidates are judged."""
    if problem.cluster is None:
        judge = Judge(problem.channels, method.fitness, holdout, problem.calibration, train, problem.seed)
        return _Closing(Here(judge), lambda: None)
    from compressor.search.cluster import Cluster  # needs the package `ray`

    if method.parallel == 1:
        problem.progress.stage("parallel=1: the cluster judges one candidate at a time; parallel= says how many")
    graph, seed = problem.channels.graph, problem.seed
    cluster = Cluster(problem.cluster, graph, method.fitness, holdout, problem.calibration, train, seed)
    return _Closing(cluster, cluster.close)


def _digest(problem: Problem, holdout: Sequence[Sample], train: Sequence[Sample]) -> str:
    """Of the batches that candidates are judged, repaired and trained on."""
    parts = {**tensors_of(holdout), **{f"t{name}": x for name, x in tensors_of(train).items()}}
    if problem.calibration is not None:
        parts |= {f"c{k}.{n}": x for k, batch in enumerate(problem.calibration.batches) for n, x in enumerate(batch)}
    return digest_of_tensors(parts)


class _Closing:
    """An executor as a context manager."""

    def __init__(self, executor: Executor[Plan, Worth], close: Callable[[], None]) -> None:
        self._executor, self._close = executor, close

    def __enter__(self) -> Executor[Plan, Worth]:
        """The executor."""
        return self._executor

    def __exit__(self, *exc: object) -> None:
        """Let go of what it holds."""
        self._close()


def images_of(trials: list[FrozenTrial]) -> int:
    """How many images went through a network for some trials."""
    return sum(int(t.user_attrs[OUTCOME]["images"]) for t in trials)
