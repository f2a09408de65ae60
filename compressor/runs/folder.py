"""A run's folder: what was asked, what is finished, and what came out.

    run.lock            held by the process that works on it
    files.json          SHA-256 of plans, weights, networks and ONNX files; JSON files hold their own
    run.json            configuration, model digest, target, versions, seed
    progress.json       results of the finished steps
    facts/              those that are long, one file each
    trials/             one measured candidate each
    study.db            trials of a search (Optuna)
    front/0/ …          one network per budget: plan.json, weights.safetensors, network.safetensors, model.onnx, measurement.json
    plan.json, …        links to the chosen member of the front
    report.html

The same command in the same folder goes on from what is finished; another command is refused, but for another budget where
the one before cannot be met.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnxruntime
import torch

from compressor.errors import DataError
from compressor.values.files import PARTIAL, digest_of_file, read_bytes, read_json, write_sealed
from compressor.values.measurement import Measurement
from compressor.values.plan import Structure, digest_of
from compressor.values.trial import Trial

_MEMBER_FILES = ("plan.json", "weights.safetensors", "network.safetensors", "model.onnx", "measurement.json")
_LONG = 20_000  # characters
_FILE = "in file"
_IMPOSSIBLE = "the budget cannot be met"
_LOCK = "run.lock"
_FILES = "files.json"
_CHANGED = "{} was changed since it was written, or is damaged; remove it, and the same command makes it anew"


class Run:
    """An output folder that belongs to one configuration. Use as a context manager: one process at a time works on it.

    Args:
        path: The folder; made if it is not there.
        config: Everything that decides the result, as plain data.
    """

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self.path, self._config = path, config

    def __enter__(self) -> Self:
        """Take the folder for this process and sweep what a kill may have left half written.

        Raises:
            DataError: The folder holds another run or something else, cannot be written, or another process works on this run.
        """
        self._check_free()
        self._lock = self._locked()
        try:
            self._check_links()
            self._begin()
            for file in self.path.rglob(f".*{PARTIAL}*"):
                if file.is_file() or file.is_symlink():
                    file.unlink(missing_ok=True)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the folder go."""
        os.close(self._lock)

    def _check_free(self) -> None:
        """Nothing is put into a folder that is somebody's."""
        try:
            names = [] if not self.path.exists() else [file.name for file in self.path.iterdir()]
        except OSError as error:
            raise DataError(
                f"{self.path} is no folder that can be read ({error.strerror}); choose another output folder"
            ) from error
        if "run.json" not in names and any(PARTIAL not in name and name != _LOCK for name in names):
            raise DataError(f"{self.path} is not empty and holds no run; choose another output folder")

    def _check_links(self) -> None:
        """What is written into the run stays in it."""
        for folder in ("facts", "trials", "front"):
            for place in (self.path / folder, *(self.path / folder).glob("*")):
                if place.is_symlink():
                    raise DataError(f"{place} is a link; the files of a run lie in its own folder")

    def _locked(self) -> int:
        """The lock is on a file of its own, which is never replaced: a lock on a file that is would be on the one before."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise DataError(f"cannot write to {self.path}: {error.strerror or error}; choose another output folder") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise DataError(f"another process is at work on {self.path}; wait for it, or choose another output folder") from error
        return handle

    def _begin(self) -> None:
        digest, existing = digest_of(self._config), self.path / "run.json"
        there = os.path.lexists(existing)
        found = read_json(existing, "choose another output folder") if there else {}
        if there and found.get("digest") != digest and not self._gave_up(found, self._config):
            raise DataError(
                f"{self.path} holds another run ({_difference(found, self._config)}); "
                "choose another output folder, or remove this one"
            )
        if found.get("digest") != digest:
            write_sealed(existing, {"schema_version": 1, "digest": digest, "config": dict(self._config), "versions": versions()})
            self._forget(_IMPOSSIBLE)

    @contextmanager
    def writing(self, file: Path) -> Iterator[None]:
        """Around the writing of a file: its digest is recorded afterwards.

        Meanwhile none is: a kill leaves a whole file, the one before or the new one, which is then taken as it is.
        """
        if self._name(file) in self._files():
            self._record(file, None)
        yield
        self._record(file, digest_of_file(file))

    def _record(self, file: Path, digest: str | None) -> None:
        files = {name: known for name, known in self._files().items() if name != self._name(file)}
        files |= {} if digest is None else {self._name(file): digest}
        write_sealed(self.path / _FILES, {"schema_version": 1, "files": files})

    def intact(self, file: Path) -> bool:
        """Whether a file is there as it was written; one that nothing is known of is taken as it is.

        Raises:
            DataError: It was changed.
        """
        if not os.path.lexists(file):
            return False
        if file.is_symlink():
            raise DataError(_CHANGED.format(file))
        known = self._files().get(self._name(file))
        found = digest_of_file(file)
        if known is None:
            self._record(file, found)
        elif known != found:
            raise DataError(_CHANGED.format(file))
        return True

    def _files(self) -> dict[str, str]:
        return digests_of_run(self.path)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def member(self, index: int) -> Path:
        """Folder of one network of a family; the first where there is one only."""
        return self.path / "front" / str(index)

    def done(self, step: str) -> dict[str, object] | None:
        """What a finished step left, or None."""
        file = self.path / "progress.json"
        if not file.exists():
            return None
        found = read_json(file).get(step)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise DataError(f"{file}: what is recorded of {step!r} is no object; remove the file, and its steps are done anew")
        if _FILE not in found:
            return found
        if not re.fullmatch(r"facts/[0-9a-f]{32}\.json", str(found[_FILE])):
            raise DataError(f"{file}: {found[_FILE]!r} is no file of a run; remove the file, and its steps are done anew")
        facts = self.path / str(found[_FILE])
        return read_json(facts) if os.path.lexists(facts) else None

    def finish(self, step: str, result: dict[str, object]) -> dict[str, object]:
        """Record that a step is finished."""
        record = result
        if len(json.dumps(result)) > _LONG:  # the file of all steps is written again with every one of them
            record = {_FILE: f"facts/{digest_of(step)[:32]}.json"}
            write_sealed(self.path / str(record[_FILE]), result)
        file = self.path / "progress.json"
        steps = read_json(file) if file.exists() else {}
        write_sealed(file, {**steps, step: record})
        return result

    def once(self, step: str, work: Callable[[], dict[str, object]]) -> dict[str, object]:
        """The result of a step: the recorded one, or that of `work`."""
        found = self.done(step)
        return found if found is not None else self.finish(step, work())

    def give_up(self, why: str) -> None:
        """Record that the budget cannot be met: what is finished serves another one."""
        self.finish(_IMPOSSIBLE, {"why": why})

    def _gave_up(self, found: Mapping[str, object], config: Mapping[str, object]) -> bool:
        return self.done(_IMPOSSIBLE) is not None and _different(found, config) == ["budget"]

    def _forget(self, step: str) -> None:
        file = self.path / "progress.json"
        if file.exists():
            write_sealed(file, {name: record for name, record in read_json(file).items() if name != step})

    def trial(self, structure: Structure, target: Mapping[str, object], work: Callable[[], Trial]) -> Trial:
        """A measured candidate: the recorded one, or that of `work`."""
        file = self.path / "trials" / f"{digest_of([structure.digest, dict(target)])[:32]}.json"
        if file.exists():
            data = read_json(file)
            return Trial(structure, *(Measurement.from_dict(data.get(name)) for name in ("measurement", "original")))
        trial = work()
        record = {
            "schema_version": 1,
            "widths": dict(structure.widths),
            **({"reads": dict(structure.reads)} if structure.reads else {}),
            **({"ranks": dict(structure.ranks)} if structure.ranks else {}),
            **({"removed": list(structure.removed)} if structure.removed else {}),
            "measurement": trial.measurement.to_dict(),
            "original": trial.original.to_dict(),
        }
        write_sealed(file, record)
        return trial

    def link_member(self, index: int) -> None:
        """Put links to the chosen member's files where a user looks first."""
        for name in _MEMBER_FILES:
            link = self.path / name
            if (self.member(index) / name).exists() and not link.exists():
                link.unlink(missing_ok=True)
                os.symlink(Path("front") / str(index) / name, link)


def read_checked(file: Path) -> bytes:
    """A file of a run, compared with the digest that the run has of it.

    Raises:
        DataError: It is missing, was changed, or leads out of the run.
    """
    root = run_of(file.parent)
    try:
        real = file.resolve(strict=True)
        inside = real if root is None else real.relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{file} is not there, or leads out of its run") from error
    data = read_bytes(real)
    known = {} if root is None else digests_of_run(root)
    if known and known.get(inside.as_posix()) != hashlib.sha256(data).hexdigest():
        raise DataError(_CHANGED.format(file))
    return data


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or lies in as a member of its front; None where it is none."""
    return next((base for base in (folder, *folder.absolute().parents[:2]) if (base / "run.json").exists()), None)


def digests_of_run(root: Path) -> dict[str, str]:
    """Names of a run's files and their SHA-256; nothing for one of before they were recorded."""
    file = root / _FILES
    found = read_json(file).get("files") if os.path.lexists(file) else {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"{file} holds no digests; remove it, and files are taken as they are")
    return found


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _different(found: Mapping[str, object], config: Mapping[str, object]) -> list[str]:
    before = found.get("config")
    before = before if isinstance(before, dict) else {}
    return [name for name in (*config, *(own for own in before if own not in config)) if before.get(name) != config.get(name)]


def _difference(found: Mapping[str, object], config: Mapping[str, object]) -> str:
    """Which parts of the configuration differ, in words."""
    names = _different(found, config)
    return "it differs in " + ", ".join(names) if names else "of another version"
