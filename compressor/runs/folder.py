"""A run's folder: what was asked, what is finished, and what came out.

    run.json            configuration, model digest, target, versions, seed
    progress.json       results of the finished steps
    facts/              those that are long, one file each
    trials/             one measured candidate each
    study.db            trials of a search (Optuna)
    front/0/ …          one network per budget: plan.json, weights.safetensors, program.pt2, model.onnx, measurement.json
    plan.json, …        links to the chosen member of the front
    report.html

The same command in the same folder goes on from what is finished; another command is refused, but for another budget where
the one before cannot be met.
"""

import fcntl
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self, cast

import numpy as np
import onnx
import onnxruntime
import torch

from compressor.errors import DataError
from compressor.values.files import PARTIAL, read_json, write_json
from compressor.values.measurement import Measurement
from compressor.values.plan import Structure, digest_of
from compressor.values.trial import Trial

_MEMBER_FILES = ("plan.json", "weights.safetensors", "program.pt2", "model.onnx", "measurement.json")
_LONG = 20_000  # characters
_FILE = "in file"
_IMPOSSIBLE = "the budget cannot be met"


class Run:
    """An output folder that belongs to one configuration. Use as a context manager: one process at a time works on it.

    Args:
        path: The folder; made if it is not there.
        config: Everything that decides the result, as plain data.

    Raises:
        DataError: The folder holds another run or something else, or cannot be written.
    """

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self.path = path
        digest = digest_of(config)
        existing = path / "run.json"
        found: Mapping[str, object] = {}
        if existing.exists():
            found = read_json(existing)
            if found.get("digest") != digest and not self._gave_up(found, config):
                raise DataError(
                    f"{path} holds another run ({_difference(found, config)}); choose another output folder, or remove this one"
                )
        elif path.exists() and (not path.is_dir() or any(PARTIAL not in file.name for file in path.iterdir())):
            raise DataError(f"{path} is not empty and holds no run; choose another output folder")
        if found.get("digest") != digest:
            write_json(existing, {"schema_version": 1, "digest": digest, "config": dict(config), "versions": versions()})
            self._forget(_IMPOSSIBLE)

    def __enter__(self) -> Self:
        """Take the folder for this process and sweep what a kill may have left half written.

        Raises:
            DataError: Another process works on this run.
        """
        self._lock = (self.path / "run.json").open("rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(f"another process is at work on {self.path}; wait for it, or choose another output folder") from error
        for file in self.path.rglob(f".*{PARTIAL}*"):
            file.unlink(missing_ok=True)
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the folder go."""
        self._lock.close()

    def member(self, index: int) -> Path:
        """Folder of one network of a family; the first where there is one only."""
        return self.path / "front" / str(index)

    def done(self, step: str) -> dict[str, object] | None:
        """What a finished step left, or None."""
        file = self.path / "progress.json"
        if not file.exists():
            return None
        found = cast(dict[str, object] | None, read_json(file).get(step))
        return read_json(self.path / str(found[_FILE])) if found is not None and _FILE in found else found

    def finish(self, step: str, result: dict[str, object]) -> dict[str, object]:
        """Record that a step is finished."""
        record = result
        if len(json.dumps(result)) > _LONG:  # the file of all steps is written again with every one of them
            record = {_FILE: f"facts/{digest_of(step)[:32]}.json"}
            write_json(self.path / str(record[_FILE]), result)
        file = self.path / "progress.json"
        steps = read_json(file) if file.exists() else {}
        write_json(file, {**steps, step: record})
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
            write_json(file, {name: record for name, record in read_json(file).items() if name != step})

    def trial(self, structure: Structure, target: Mapping[str, object], work: Callable[[], Trial]) -> Trial:
        """A measured candidate: the recorded one, or that of `work`."""
        file = self.path / "trials" / f"{digest_of([structure.digest, dict(target)])[:32]}.json"
        if file.exists():
            data = read_json(file)
            return Trial(
                structure,
                Measurement.from_dict(cast(dict[str, object], data["measurement"])),
                Measurement.from_dict(cast(dict[str, object], data["original"])),
            )
        trial = work()
        record = {
            "schema_version": 1,
            "widths": dict(structure.widths),
            **({"reads": dict(structure.reads)} if structure.reads else {}),
            **({"ranks": dict(structure.ranks)} if structure.ranks else {}),
            "measurement": trial.measurement.to_dict(),
            "original": trial.original.to_dict(),
        }
        write_json(file, record)
        return trial

    def link_member(self, index: int) -> None:
        """Put links to the chosen member's files where a user looks first."""
        for name in _MEMBER_FILES:
            link = self.path / name
            if (self.member(index) / name).exists() and not link.exists():
                link.unlink(missing_ok=True)
                os.symlink(Path("front") / str(index) / name, link)


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
    before = cast(Mapping[str, object], found.get("config") or {})
    return [name for name in config if before.get(name) != config[name]]


def _difference(found: Mapping[str, object], config: Mapping[str, object]) -> str:
    """Which parts of the configuration differ, in words."""
    names = _different(found, config)
    return "it differs in " + ", ".join(names) if names else "of another version"
