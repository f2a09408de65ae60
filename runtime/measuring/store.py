"""Measurements that outlive a run: SQLite, shared by any number of processes.

The key is what was built, on what, and how it was timed: (digest of the architecture, fingerprint of the target,
protocol). A new driver, version or setting gives another fingerprint, so an old number is never reused for it.
Weights are not in the key: a latency depends on shapes.
"""

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from compressor.errors import DataError
from compressor.values.files import cache_folder
from compressor.values.json_text import parse_json
from compressor.values.measurement import Measurement
from compressor.values.plan import digest_of

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

SCHEMA = 1
_PATIENCE = 60.0  # seconds, for others to finish writing
_TABLE = """
CREATE TABLE IF NOT EXISTS measurements (
    id INTEGER PRIMARY KEY, built TEXT NOT NULL, target TEXT NOT NULL, fingerprint TEXT NOT NULL, protocol TEXT NOT NULL,
    created REAL NOT NULL, record TEXT NOT NULL, extra TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_key ON measurements (built, target, protocol);
"""


class MeasurementStore:
    """A file of measurements; every call opens, locks and closes it, so that processes may share it and be killed.

    Args:
        path: The file; in the user's cache folder by default. One that is no database, is damaged or of another
            schema is renamed to `<name>.set-aside-<time>` and a new one begun; nothing is deleted.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "latency.sqlite"

    def get(self, built: str, target: Mapping[str, object], protocol: str) -> tuple[Measurement, dict[str, object]] | None:
        """The latest measurement of what was built, and what was stored beside it; None if there is none."""
        query = "SELECT record, extra FROM measurements WHERE built = ? AND target = ? AND protocol = ? ORDER BY id DESC LIMIT 1"
        row = self._do(lambda connection: connection.execute(query, (built, digest_of(target), protocol)).fetchone())
        if row is None:
            return None
        try:
            return Measurement.from_dict(parse_json(row[0])), parse_json(row[1])
        except (DataError, TypeError) as error:
            logger.warning("%s: a record cannot be read (%s); it is measured anew", self.path, error)
            return None

    def put(self, built: str, found: Measurement, protocol: str, extra: Mapping[str, object] | None = None) -> None:
        """Add a measurement; earlier ones of the same key stay.

        Args:
            built: Digest of the architecture that was built.
            found: The measurement; its target is the key.
            protocol: How it was timed.
            extra: Plain data to keep beside it.
        """
        target = dict(found.target)
        row = (
            built,
            digest_of(target),
            json.dumps(target),
            protocol,
            time.time(),
            json.dumps(found.to_dict()),
            json.dumps(extra or {}),
        )
        statement = (
            "INSERT INTO measurements (built, target, fingerprint, protocol, created, record, extra) VALUES (?, ?, ?, ?, ?, ?, ?)"
        )

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute(statement, row)

        self._do(write)

    def __len__(self) -> int:
        """Number of measurements."""
        return int(self._do(lambda connection: connection.execute("SELECT COUNT(*) FROM measurements").fetchone()[0]))

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Work on the file; one that turns out to be damaged is set aside, and the work done on a new one."""
        try:
            with self._connection() as connection:
                return work(connection)
        except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.OperationalError) and not str(error).startswith(("no such", "table", "malformed")):
                raise DataError(f"cannot use {self.path}: {error}; set COMPRESSOR_CACHE") from error
            with self._alone():
                self._set_aside(str(error))
            with self._connection() as connection:
                return work(connection)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._opened()
        except (OSError, sqlite3.OperationalError) as error:
            said = getattr(error, "strerror", None) or error
            raise DataError(f"cannot keep measurements in {self.path}: {said}; set COMPRESSOR_CACHE") from error
        with closing(connection):
            yield connection

    def _opened(self) -> sqlite3.Connection:
        connection, reason = self._tried()
        if reason is None:
            return connection
        connection.close()
        with self._alone():  # a file is begun or set aside by one process, and the others find it whole
            connection, reason = self._tried()
            if reason:
                connection.close()
                self._set_aside(reason)
                connection = sqlite3.connect(self.path, timeout=_PATIENCE)
            if reason is not None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(f"BEGIN; {_TABLE} PRAGMA user_version = {SCHEMA}; COMMIT;")
            return connection

    def _tried(self) -> tuple[sqlite3.Connection, str | None]:
        """The file as it is, and why it cannot be used; empty where there is nothing in it yet."""
        connection = sqlite3.connect(self.path, timeout=_PATIENCE)
        try:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            active = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()[0]
        except sqlite3.OperationalError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            return connection, str(error)
        if active:
            return connection, "it holds views or triggers, which would run when it is read"
        if version == SCHEMA:
            return connection, None
        return connection, f"it has schema {version}, this version reads {SCHEMA}" if version or tables else ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when it is closed, and by the system where the process is killed
            yield

    def _set_aside(self, reason: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.set-aside-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
        logger.warning("%s cannot be used (%s); it is kept as %s and a new one is begun", self.path, reason, aside.name)
        for suffix in ("", "-wal", "-shm"):
            file = self.path.with_name(self.path.name + suffix)
            if file.exists():
                file.rename(aside.with_name(aside.name + suffix))
