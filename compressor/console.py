"""Progress on a terminal: a bar with time left; plain lines where there is no terminal."""

import signal
import sys
import time
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from compressor.progress import Progress

_EVERY_S = 10.0
_INTERRUPTED: list[int] = []


def heed_interrupts() -> None:
    """Make ctrl-C end the work even where it is swallowed at first.

    An exception raised by a signal inside a destructor or a callback of a library is printed and dropped by Python.
    So the signal is remembered, and the next word of progress raises it again.
    """

    def interrupted(number: int, frame: FrameType | None) -> None:
        del frame
        _INTERRUPTED.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)


def _raise_if_interrupted() -> None:
    if _INTERRUPTED:
        raise KeyboardInterrupt


class ConsoleProgress(Progress):
    """Shows stages and bars on standard error. Use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._bar: Bar | None = None
        self._last = time.monotonic()
        self._started = time.monotonic()

    def stage(self, text: str) -> None:
        """Print a line for a new step."""
        _raise_if_interrupted()
        self.close()
        self._last = self._started = time.monotonic()
        self._console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", markup=True)

    def tick(self, done: int, total: int | None, text: str) -> None:
        """Move the bar, or print a line every ten seconds."""
        _raise_if_interrupted()
        if not self._console.is_terminal:
            self._line(done, total, text)
            return
        if self._bar is None:
            columns = (
                BarColumn(24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task(text, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=text)
        if total is not None and done >= total:
            self.close()

    def _line(self, done: int, total: int | None, text: str) -> None:
        now = time.monotonic()
        if now - self._last < _EVERY_S:
            return
        self._last = now
        left = "" if not total else f", {(now - self._started) / done * (total - done):.0f} s left"
        self._console.print(f"         {done}/{total or '?'}  {text}{left}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "ConsoleProgress":
        """The progress itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Take the bar away."""
        self.close()
