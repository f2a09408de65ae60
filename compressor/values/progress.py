"""How long work tells what it is doing. The library is silent; a caller passes something that shows it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchState:
    """How far a search is.

    Attributes:
        name: Of the search.
        done: Trials that are finished, failed ones among them.
        total: Trials there will be.
        failed: Trials that failed.
        best: Best objective so far; None where there is none.
        current: Objective of the last trial; None where it failed.
        unit: What the objective is.
        budget: In words.
        per_minute: Trials per minute, of this process.
        left_s: Seconds until the end, at this rate.
    """

    name: str
    done: int
    total: int
    failed: int
    best: float | None
    current: float | None
    unit: str
    budget: str
    per_minute: float
    left_s: float

    def line(self) -> str:
        """On one line."""
        best, current = (f"{value:.4f}" if value is not None else "-" for value in (self.best, self.current))
        failed = f", {self.failed} failed" if self.failed else ""
        budget = f", {self.budget}" if self.budget else ""
        return f"{self.unit}: best {best}, last {current}{budget}, {self.per_minute:.1f} trials/min{failed}"


class Progress:
    """Shows nothing; subclass to show something."""

    def stage(self, text: str) -> None:
        """A new step begins."""

    def tick(self, done: int, total: int | None, text: str) -> None:
        """`done` of `total` units of the step are finished (None: nobody knows how many there are)."""

    def search(self, state: SearchState) -> None:
        """A trial of a search is finished."""
        self.tick(state.done, state.total, state.line())
