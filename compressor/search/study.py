"""`Search`: a study that asks a sampler, has trials evaluated, and tells it what came out; killed, it goes on.

A trial is finished by its last write. What a kill interrupts is taken up again with the same parameters by whoever comes
next; samplers draw from the seed and the trials before alone. Trials that fail are recorded with their reason.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from compressor.errors import CompressorError, DataError
from compressor.search.execution import Executor
from compressor.search.samplers import ABANDONED, Past, PopulationSampler
from compressor.search.storage import (
    ATTEMPTS,
    OWNER,
    beating,
    claim,
    is_own,
    let_go,
    lost_trials,
    open_storage,
    owners_of,
    readable,
)
from compressor.values.progress import Progress, SearchState

logger = logging.getLogger(__name__)

STRUCTURE, OUTCOME, FAILURE = "structure", "outcome", "failure"
"""User attributes: what a trial evaluates, what came out of it, and why it failed."""

_QUESTION = "question"  # user attribute of a study, see `Job`
_EXPECTED = (CompressorError, RuntimeError, MemoryError, ArithmeticError, OSError)  # of one trial, not of the program
_AGAIN = 16  # times that a candidate is drawn until it stands for something that was not judged before
_HOPELESS = 5  # so many failures and nothing else: the search itself is wrong
_ATTEMPTS = 5  # processes that may be lost with a trial, one after the other, until it counts as failed
_LOST = "if for a lack of memory, smaller batches of the hold-out take less"
_POLL_S, _SAY_S = 1.0, 30.0

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Sampler = Callable[[int], BaseSampler]


@dataclass(frozen=True)
class Job(Generic[Task, Answer]):
    """What is searched.

    Attributes:
        name: Of the study.
        digest: Of everything that decides a trial's value; a study of another one is refused.
        question: Of the same without the data; that another study has it is said, for its trials are not used.
        space: Parameter name -> distribution.
        sampler: From the index of a trial, its sampler.
        direction: Of the objective.
        trials: How many; a budget of evaluations.
        parallel: How many are under way at once; the search depends on it, not on where they run.
        decode: From parameters and the index of a trial, plain data that say what is evaluated; two trials share them only where
            they evaluate the same. Kept from the first: what a trial stands for does not change as its decoder learns.
        task: From parameters and these data, what is evaluated.
        value: The objective of an answer, and what is recorded of it.
        budget: In words, for the display.
        unit: Of the objective, in words.
        distinct: Whether our samplers draw again where a candidate stands for what was judged before, which would teach nothing.
    """

    name: str
    digest: str
    space: Mapping[str, BaseDistribution]
    sampler: Sampler
    direction: Literal["minimize", "maximize"]
    trials: int
    parallel: int
    decode: Callable[[Mapping[str, Any], int], dict[str, Any]]
    task: Callable[[Mapping[str, Any], Mapping[str, Any]], Task]
    value: Callable[[Answer], tuple[float, dict[str, Any]]]
    budget: str = ""
    unit: str = "objective"
    distinct: bool = False
    question: str = ""


class Search(Generic[Task, Answer]):
    """One process's share of a study.

    Args:
        job: What is searched.
        executor: Where trials are evaluated.
        storage: URL; None for memory.
        progress: Where to show how far it is.
        alone: Whether no other process works on this storage: unfinished trials are then of processes that are no more,
            wherever these ran.

    Raises:
        DataError: The storage cannot be opened, or holds another study of this name.
    """

    def __init__(
        self,
        job: Job[Task, Answer],
        executor: Executor[Task, Answer],
        storage: str | None = None,
        progress: Progress | None = None,
        alone: bool = False,
    ) -> None:
        self._job, self._executor, self._progress, self._alone = job, executor, progress or Progress(), alone
        self.after: Callable[[int], None] = lambda count: None
        with readable(storage):
            self.study = optuna.create_study(
                storage=open_storage(storage), study_name=job.name, direction=job.direction, load_if_exists=True
            )
            trials = self.study.get_trials(deepcopy=False)  # before the digest, which whoever is first writes before any trial
            found = self.study.user_attrs.get("digest")
        if found is None and not trials:
            self._say_others(storage)
            self.study.set_user_attr("digest", job.digest)
            self.study.set_user_attr(_QUESTION, job.question)
        elif found != job.digest:
            raise DataError(f"{storage} holds another study named {job.name}: model, method, budget or seed differ")
        self._began = time.monotonic()
        self._ended = 0

    def _say_others(self, storage: str | None) -> None:
        """A search that begins anew beside one that asked the same of other data."""
        if storage is None or not self._job.question:
            return
        for other in optuna.get_all_study_summaries(self.study._storage):
            if other.user_attrs.get(_QUESTION) == self._job.question and other.n_trials:
                logger.warning(
                    "%s holds %d trials of the same search on other images, which are not used: its data changed, or are drawn "
                    "anew each time (by a generator that is neither a global one nor the loader's `generator`)",
                    storage, other.n_trials,
                )  # fmt: skip

    def run(self) -> list[FrozenTrial]:
        """Do the trials that are not done; all good ones, best first.

        Raises:
            CompressorError: Nothing but failures.
        """
        try:
            with contextlib.nullcontext() if self._alone else beating(self.study):
                self._do()
        except BaseException as error:  # an interrupt too: the same call in the same process must find nobody at work
            with contextlib.suppress(SQLAlchemyError, StorageInternalError):
                let_go(self.study)
            if isinstance(error, SQLAlchemyError | StorageInternalError):
                raise DataError(f"the study's storage cannot be used any more: {str(error).splitlines()[0]}") from error
            raise
        good = [t for t in _begun(self._trials()) if t.state == TrialState.COMPLETE]
        sign = -1 if self._job.direction == "maximize" else 1
        return sorted(good, key=lambda t: (sign * float(t.value or 0.0), t.number))

    def _do(self) -> None:
        self.after(len(self.finished()))  # what a kill has left undone
        waiting: deque[int] = deque()
        said = 0.0
        while True:
            trials = self._trials()
            if not waiting and (lost := lost_trials(trials, self._alone)):
                waiting.extend(self._adopted(lost))
                trials = self._trials()
            begun = _begun(trials)
            if len(waiting) < self._job.parallel and len(begun) < self._job.trials:
                asked = self._ask(trials)
                waiting.extend([] if asked is None else [asked])
            elif waiting:
                self._tell(waiting.popleft())
            elif others := [t for t in trials if t.state == TrialState.RUNNING]:
                if time.monotonic() - said > _SAY_S:
                    said = time.monotonic()
                    logger.warning("waiting for %d trials of other processes: %s", len(others), owners_of(others))
                time.sleep(_POLL_S)  # if a process is lost, its trial is adopted
            elif len(begun) >= self._job.trials:
                break

    def finished(self) -> list[FrozenTrial]:
        """Finished trials, good and failed, in order."""
        return [t for t in _begun(self._trials()) if t.state in (TrialState.COMPLETE, TrialState.FAIL)]

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _adopted(self, lost: list[FrozenTrial]) -> list[int]:
        """Go on with the trials that lost processes have begun, with the same parameters, for the same candidates."""
        found = []
        for trial in lost:
            if set(trial.params) != set(self._job.space):  # a rival was still proposing
                self._abandon(trial.number)
                continue
            attempts = int(trial.user_attrs.get(ATTEMPTS, 1)) + (trial.user_attrs.get(OWNER) is not None)
            self._note(trial.number, OWNER, claim())
            if not is_own(self.study._storage.get_trial(trial._trial_id)):
                continue
            self._note(trial.number, ATTEMPTS, attempts)
            if attempts > _ATTEMPTS:
                self._fail(trial.number, CompressorError(f"{_ATTEMPTS} processes that judged it were lost; {_LOST}"))
                continue
            begun = [t for t in _begun(self._trials()) if t.number < trial.number]
            if self._submitted(trial.number, trial.params, begun, trial.user_attrs.get(STRUCTURE)):
                found.append(trial.number)
        return found

    def _ask(self, trials: list[FrozenTrial]) -> int | None:
        """Begin a trial; None where its parameters stand for nothing that may be built, or another process was first."""
        number, params, structure = self._begin(trials)
        if params is None:
            self._abandon(number)
            return None
        return number if self._submitted(number, params, _begun(trials), structure) else None

    def _submitted(
        self, number: int, params: Mapping[str, Any], begun: list[FrozenTrial], structure: dict[str, Any] | None
    ) -> bool:
        """Submit a trial, whose candidate may be known already; False where it is finished at once."""
        try:
            if structure is None:
                structure = self._job.decode(params, len(begun))
                self._note(number, STRUCTURE, structure)
            task = self._job.task(params, structure)
        except _EXPECTED as error:
            self._fail(number, error)
            return False
        known = next((t for t in begun if t.state == TrialState.COMPLETE and t.user_attrs.get(STRUCTURE) == structure), None)
        if known is not None and known.value is not None:  # judged before: it is worth the same
            outcome = {**known.user_attrs[OUTCOME], "images": 0, "seconds": 0.0, "same_as": known.number}
            self._finish(number, known.value, outcome)
            return False
        self._executor.submit(number, task)
        return True

    def _begin(self, trials: list[FrozenTrial]) -> tuple[int, dict[str, Any] | None, dict[str, Any] | None]:
        """Begin the trial after these: its number, its parameters, and its candidate where that is known already.

        No parameters where another process began one in between, for which these were drawn, too.
        """
        expected = len(trials)
        sampler = self._job.sampler(len(_begun(trials)))
        self.study.sampler = sampler
        if isinstance(sampler, PopulationSampler):  # all in one write: Optuna's own `ask` needs one for each parameter
            params, attributes, structure = self._drawn(sampler, sampler.past(self.study, expected, trials))
            trial_id = self._create(params, dict(self._job.space), attributes, {STRUCTURE: structure} if structure else {})
            number = self.study._storage.get_trial_number_from_id(trial_id)
            return number, params if number == expected else None, structure or None
        trial = optuna.Trial(self.study, self._create({}, {}, {}, {}))  # an owner from the first, which `ask` does not give
        if trial.number != expected:
            return trial.number, None, None
        self.study._thread_local.cached_all_trials = None  # as `ask` does
        return trial.number, {name: trial._suggest(name, distribution) for name, distribution in self._job.space.items()}, None

    def _drawn(self, sampler: PopulationSampler, past: Past) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = [t.user_attrs.get(STRUCTURE) for t in past.finished] if self._job.distinct else []
        for again in range(_AGAIN):
            params, attributes = sampler.draw(past, self._job.space, again)
            structure = self._structure(params, past.index)
            if structure not in known:
                break
        return params, attributes, structure

    def _structure(self, params: Mapping[str, Any], index: int) -> dict[str, Any]:
        """What a trial would evaluate; nothing where it cannot be built, which its trial will say."""
        try:
            return self._job.decode(params, index)
        except _EXPECTED:
            return {}

    def _create(
        self, params: dict[str, Any], space: dict[str, BaseDistribution], system: dict[str, Any], user: dict[str, Any]
    ) -> int:
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING, params=params, distributions=space, system_attrs=system, user_attrs={OWNER: claim(), **user}
        )
        return self.study._storage.create_new_trial(self.study._study_id, template)

    def _note(self, number: int, name: str, value: object) -> None:
        self.study._storage.set_trial_user_attr(self._id(number), name, value)

    def _abandon(self, number: int) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.study._storage.set_trial_system_attr(self._id(number), ABANDONED, True)
            self.study._storage.set_trial_state_values(self._id(number), TrialState.FAIL)

    def _tell(self, number: int) -> None:
        try:
            value, outcome = self._job.value(self._executor.outcome(number))
            if value != value:
                raise DataError("the objective is not a number")
        except _EXPECTED as error:
            self._fail(number, error)
        else:
            self._finish(number, value, outcome)

    def _finish(self, number: int, value: float, outcome: dict[str, Any]) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process took this one for lost
            self._note(number, OUTCOME, outcome)
            self.study.tell(number, value, skip_if_finished=True)
        self._show()

    def _fail(self, number: int, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("trial %d failed: %s", number, reason)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._note(number, FAILURE, reason)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        finished = self.finished()
        if len(finished) >= _HOPELESS and all(t.state == TrialState.FAIL for t in finished):
            kind = type(error) if isinstance(error, CompressorError) else CompressorError
            raise kind(f"the first {len(finished)} trials all failed, the last with: {error}") from error
        self._show()

    def _id(self, number: int) -> int:
        return self.study._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)

    def _show(self) -> None:
        finished = self.finished()
        self._ended += 1
        self.after(len(finished))
        rate = 60 * self._ended / max(time.monotonic() - self._began, 1e-9)
        good = [float(t.value) for t in finished if t.value is not None]
        best = (max if self._job.direction == "maximize" else min)(good, default=None)
        left = 60 * (self._job.trials - len(finished)) / rate
        last = finished[-1].value if finished else None
        failed = len(finished) - len(good)
        job, done = self._job, len(finished)
        self._progress.search(SearchState(job.name, done, job.trials, failed, best, last, job.unit, job.budget, rate, left))


def _begun(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that count."""
    return [t for t in trials if ABANDONED not in t.system_attrs]
