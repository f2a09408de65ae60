"""A process that answers JSON requests line by line: what goes wrong in it costs one answer, never this process."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, Queue
from typing import Any

from compressor.errors import BackendError

Progress = Callable[[str, int, int], None]


class WorkerProcess:
    """Starts a worker and asks it things; close it when done.

    Args:
        command: Program and arguments.
        name: For messages.
        environment: Of the process; this one's by default.

    Raises:
        BackendError: The program cannot be started.
    """

    def __init__(self, command: Sequence[str], name: str, environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._answers: Queue[str | None] = Queue()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env=None if environment is None else dict(environment),
            )
        except OSError as error:
            raise BackendError(f"{name}: cannot start {command[0]}: {error.strerror or error}") from error
        threading.Thread(target=self._read, name=f"{name} answers", daemon=True).start()
        self._listener = threading.Thread(target=self._listen, name=f"{name} messages", daemon=True)
        self._listener.start()

    def ask(self, op: str, timeout_s: float, progress: Progress | None = None, **arguments: object) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            op: What to do.
            timeout_s: After this many seconds without an answer the worker is killed.
            progress: Called with `(phase, step, steps)` while the worker reports progress.
            arguments: Plain data.

        Raises:
            BackendError: The worker refuses, crashes, or does not answer in time. After the latter two it is gone.
        """
        if self._process.poll() is not None:
            raise BackendError(self._obituary(op))
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise BackendError(self._obituary(op)) from error
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._answers.get(timeout=max(deadline - time.monotonic(), 0.01))
            except Empty:
                self.close()
                raise BackendError(f"{self._name} did not answer `{op}` within {timeout_s:.0f} s and was stopped") from None
            if line is None:
                self._process.wait()
                raise BackendError(self._obituary(op))
            answer: dict[str, Any] = json.loads(line)
            if "progress" in answer:
                if progress is not None:
                    phase, _, step, steps = answer["progress"]
                    progress(phase, step, steps)
                continue
            if not answer.pop("ok"):
                raise BackendError(f"{self._name}: {answer['error']}")
            return answer

    def close(self) -> None:
        """End the worker, at once; its children as well."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):  # what was not sent yet has nobody to read it
                stream.close()  # type: ignore[union-attr]

    def _obituary(self, op: str) -> str:
        self._listener.join(timeout=1.0)
        code = self._process.poll()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
        last = "; ".join(list(self._said)[-3:]) or "it said nothing"
        return f"{self._name} {how} during `{op}`: {last}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._answers.put(line)
        except ValueError:  # closed meanwhile
            pass
        self._answers.put(None)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        try:
            for line in self._process.stderr:
                if line.strip():
                    self._said.append(line.strip())
        except ValueError:  # closed meanwhile
            pass
