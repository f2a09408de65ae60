"""Progress on a terminal: a bar with time left; plain lines where there is no terminal."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from compressor.values.progress import Progress, SearchState

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
        self._live: Live | None = None
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

    def search(self, state: SearchState) -> None:
        """Draw the table anew, or print a line every ten seconds."""
        _raise_if_interrupted()
        if not self._console.is_terminal:
            self._line(state.done, state.total, state.line(), state.left_s)
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(_table(state), refresh=True)
        if state.done >= state.total:
            self.close()

    def _line(self, done: int, total: int | None, text: str, left_s: float | None = None) -> None:
        now = time.monotonic()
        if now - self._last < _EVERY_S:
            return
        self._last = now
        if left_s is None and total:
            left_s = (now - self._started) / done * (total - done)
        left = "" if left_s is None else f", {left_s:.0f} s left"
        self._console.print(f"         {done}/{total or '?'}  {text}{left}")

    def close(self) -> None:
        """Take bar and table away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "ConsoleProgress":
        """The progress itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Take the bar away."""
        self.close()


def _table(state: SearchState) -> Table:
    """A search at a glance."""
    table = Table(title=state.name, title_justify="left", show_header=False, min_width=48)
    table.add_column(style="dim")
    table.add_column(justify="right")
    minutes, seconds = divmod(round(state.left_s), 60)
    for name, value in (
        (f"best {state.unit}", f"{state.best:.4f}" if state.best is not None else "none yet"),
        ("last", f"{state.current:.4f}" if state.current is not None else "failed"),
        ("budget", state.budget or "none"),
        ("trials", f"{state.done} of {state.total}" + (f", {state.failed} failed" if state.failed else "")),
        ("per minute", f"{state.per_minute:.1f}"),
        ("left", f"{minutes} min {seconds:02} s"),
    ):
        table.add_row(name, value)
    return table


def fail(message: str, code: int) -> NoReturn:
    """One message, and the end."""
    print(f"compressor: {message}", file=sys.stderr)
    sys.exit(code)


class resumable:  # noqa: N801 - reads as a statement
    """Says on ctrl-C where the state is."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Translate an interrupt."""
        if kind is KeyboardInterrupt:
            fail(f"interrupted; what is finished is kept in {self._out}, the same command goes on from there", 1)
