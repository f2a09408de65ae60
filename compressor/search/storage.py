"""Where studies are kept, and whose trials are whose."""

import contextlib
import copy
import json
import os
import platform
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from compressor.errors import CompressorError, DataError
from compressor.values.json_text import parse_json
from compressor.values.plan import digest_of

OWNER = "owner"
"""User attribute: which process evaluates a trial."""
ATTEMPTS = "attempts"
"""User attribute: how many processes have begun to evaluate a trial, where the first was lost."""

_BEAT_S, _PATIENCE_S = 30.0, 180.0  # how often an owner says that it is there; silent for so long, it is taken to be lost
_DAMAGED = "the study's storage {} is damaged, or of another version ({}); remove it, and the search begins anew"
_MALFORMED = (LookupError, ValueError, TypeError, AttributeError)  # of an attribute or distribution of another form
_TRIES = 5  # of opening a storage that another process sets up at the same moment


def open_storage(url: str | None) -> BaseStorage:
    """A storage by its URL; None for one in memory.

    SQLite waits for other processes of the machine, and writes ahead: a commit is safe from a kill of the process, not from a
    power cut. For several machines take a database server.

    Raises:
        DataError: It cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url is None:
            return optuna.storages.InMemoryStorage()
        if not url.startswith("sqlite"):
            return optuna.storages.get_storage(_Storage(url))
        file = url.partition("sqlite:///")[2]
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        if not file or file == ":memory:":
            raise ValueError("name a file, sqlite:///FILE")
        _check_sqlite(file)
        storage = _set_up(url)
        with storage.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        sqlalchemy.event.listen(storage.engine, "connect", _relax)
        storage.engine.dispose()
        return optuna.storages.get_storage(storage)
    except DataError:
        raise
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError, ImportError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the study's storage {url} cannot be opened: {line}") from error


def _check_sqlite(file: str) -> None:
    """Refuse a file that is no database, or a damaged one, before anything is read from it."""
    path = Path(file)
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise DataError(f"the study's storage {file} is no plain file")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=120)) as connection:
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
            if connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()[0]:
                found = "it holds views or triggers, which would run when it is read"
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise DataError(_DAMAGED.format(file, found))


@contextlib.contextmanager
def readable(url: str | None) -> Iterator[None]:
    """What cannot be read of a storage is said as such.

    Raises:
        DataError: It is damaged, or was written by another version.
    """
    try:
        yield
    except CompressorError:
        raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, *_MALFORMED) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(_DAMAGED.format(url, line)) from error


class _Storage(RDBStorage):
    """Optuna's, with the parameters of a new trial in one statement: its own looks two things up for each of a hundred."""

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        if template_trial is None or not template_trial.params:
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        bare = copy.copy(template_trial)
        bare.params, bare.distributions = {}, {}
        trial = super()._get_prepared_new_trial(study_id, bare, session)
        space, values = template_trial.distributions, template_trial.params
        rows = [
            {
                "trial_id": trial.trial_id,
                "param_name": name,
                "param_value": distribution.to_internal_repr(values[name]),
                "distribution_json": optuna.distributions.distribution_to_json(distribution),
            }
            for name, distribution in space.items()
        ]
        session.execute(sqlalchemy.insert(models.TrialParamModel), rows)
        return trial


def _set_up(url: str) -> RDBStorage:
    for attempt in range(_TRIES):
        try:
            return _Storage(url, engine_kwargs={"connect_args": {"timeout": 120}})
        except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.IntegrityError):
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def _relax(connection: object, record: object) -> None:
    del record
    with contextlib.closing(connection.cursor()) as cursor:  # type: ignore[attr-defined]
        cursor.execute("PRAGMA synchronous=NORMAL")


def owner() -> dict[str, object]:
    """This process."""
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def claim() -> dict[str, object]:
    """What a trial says of the process that evaluates it."""
    return {**owner(), "since": time.time()}


def is_own(trial: FrozenTrial) -> bool:
    """Whether this process evaluates a trial."""
    return is_mine(trial.user_attrs.get(OWNER))


def is_mine(who: object) -> bool:
    """Whether a claim is of this process."""
    return isinstance(who, dict) and {name: who.get(name) for name in owner()} == owner()


_LONGEST_NAME = 400  # characters of an attribute's name: database servers keep 512
_LONGEST = 16_000  # characters of an attribute: MySQL keeps 64 KiB of it, and a character may be escaped


def shared_once(url: str, study: str, key: str, work: Callable[[], dict[str, object]]) -> dict[str, object]:
    """What a function returned under a key, for all processes that share a storage.

    Args:
        url: Of the storage.
        study: Name of the study that keeps it; it has no trials.
        key: Of the result.
        work: Called where nothing is kept yet.
    """
    storage = open_storage(url)
    key = key if len(key) <= _LONGEST_NAME else f"{key[:_LONGEST_NAME]} {digest_of(key)[:16]}"
    kept = optuna.create_study(storage=storage, study_name=study, load_if_exists=True)
    if key not in kept.user_attrs:
        text, mine = json.dumps(work()), uuid.uuid4().hex[:8]
        parts = {f"{key} {mine} {k}": text[k : k + _LONGEST] for k in range(0, len(text), _LONGEST)}
        for name, part in parts.items():
            kept.set_user_attr(name, part)
        if key not in kept.user_attrs:  # who was first is right, so that all have the same
            kept.set_user_attr(key, list(parts))
    attributes = kept.user_attrs
    with readable(url):
        return parse_json("".join(attributes[part] for part in attributes[key]))


def lost_trials(trials: list[FrozenTrial], alone: bool = False) -> list[FrozenTrial]:
    """The unfinished trials of processes that are no more, in order.

    Args:
        trials: Of a study.
        alone: Whether this process is known to be the only one: then all are that are not its own, even where the machine was
            started anew or the container is another one, and nobody could look whether their process lives.
    """
    return [t for t in trials if t.state == TrialState.RUNNING and (_is_lost(t) or (alone and not is_own(t)))]


def owners_of(trials: list[FrozenTrial]) -> str:
    """Who evaluates some trials, in words."""
    found = [t.user_attrs.get(OWNER) for t in trials]
    return ", ".join(
        sorted({f"{str(who.get('host')).split()[0]} process {who.get('pid')}" if isinstance(who, dict) else "?" for who in found})
    )


@contextlib.contextmanager
def beating(study: optuna.Study) -> Iterator[None]:
    """Meanwhile the unfinished trials of this process say every half minute that it is there, to those on other machines."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with contextlib.suppress(optuna.exceptions.StorageInternalError):  # the next time, then
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    if is_own(trial):
                        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                            study._storage.set_trial_user_attr(trial._trial_id, OWNER, claim())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def let_go(study: optuna.Study) -> None:
    """Leave the unfinished trials of this process to whoever comes next."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_own(trial):
            study._storage.set_trial_user_attr(trial._trial_id, OWNER, None)


def _is_lost(trial: FrozenTrial) -> bool:
    if trial.user_attrs.get(OWNER, "") is None:  # let go by a process that was interrupted and lives on
        return True
    who = trial.user_attrs.get(OWNER)
    return isinstance(who, dict) and is_gone(who)  # what is somebody's who does not say stays his


def is_gone(who: Mapping[str, Any]) -> bool:
    """Whether the process that made a claim is no more."""
    if who.get("host") != _host():
        since = who.get("since", 0.0)
        return isinstance(since, int | float) and time.time() - since > _PATIENCE_S
    pid = who.get("pid")
    return isinstance(pid, int) and _started(pid) != who.get("started")  # what is malformed is taken for somebody's


def _host() -> str:
    """This machine since it was started, and its processes' name space: containers of one name are different places."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's clock; None where it is not there."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:  # not Linux
        os.kill(pid, 0)
    except OSError:
        return None
    return "running"
