"""Where studies are kept, and whose trials are whose."""

import contextlib
import os
import platform
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from compressor.errors import DataError

OWNER = "owner"
"""User attribute: which process evaluates a trial."""

_PATIENCE = timedelta(hours=1)  # after which a trial of another machine is taken to be lost


def open_storage(url: str | None) -> BaseStorage:
    """A storage by its URL; None for one in memory.

    SQLite waits for other processes, and writes ahead: a commit is safe from a kill of the process, not from a power cut.

    Raises:
        DataError: It cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url is None:
            return optuna.storages.InMemoryStorage()
        if not url.startswith("sqlite"):
            return optuna.storages.get_storage(url)
        file = url.partition("sqlite:///")[2]
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 120}})
        with storage.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        sqlalchemy.event.listen(storage.engine, "connect", _relax)
        storage.engine.dispose()
        return optuna.storages.get_storage(storage)
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError, ImportError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise DataError(f"the study's storage {url} cannot be opened: {line}") from error


def _relax(connection: object, record: object) -> None:
    del record
    with contextlib.closing(connection.cursor()) as cursor:  # type: ignore[attr-defined]
        cursor.execute("PRAGMA synchronous=NORMAL")


def owner() -> dict[str, object]:
    """This process."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}


def lost_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The unfinished trials of processes that are no more, in order."""
    return [t for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _is_lost(t)]


def let_go(study: optuna.Study) -> None:
    """Leave the unfinished trials of this process to whoever comes next."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(OWNER) == owner():
            study._storage.set_trial_user_attr(trial._trial_id, OWNER, None)


def _is_lost(trial: FrozenTrial) -> bool:
    if trial.user_attrs.get(OWNER, "") is None:  # let go by a process that was interrupted and lives on
        return True
    who = trial.user_attrs.get(OWNER)
    since = datetime.now() - (trial.datetime_start or datetime.now())
    if not isinstance(who, dict) or who.get("host") != platform.node():
        return since > (_PATIENCE if who else timedelta(minutes=1))
    return _started(int(who["pid"])) != who.get("started")


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
