"""Where trials are evaluated: here, one after the other; `cluster.py` has the other way."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Task = TypeVar("Task", contravariant=True)
Answer = TypeVar("Answer", covariant=True)
OwnTask = TypeVar("OwnTask")
OwnAnswer = TypeVar("OwnAnswer")


class Executor(Protocol[Task, Answer]):
    """Evaluates trials."""

    def submit(self, number: int, task: Task) -> None:
        """Begin, or make ready to begin."""

    def outcome(self, number: int) -> Answer:
        """Wait for a trial; it is forgotten afterwards.

        Raises:
            Exception: What the evaluation raised.
        """


class Here(Generic[OwnTask, OwnAnswer]):
    """Evaluates a trial in this process, when it is asked for.

    Args:
        evaluate: What is called.
    """

    def __init__(self, evaluate: Callable[[OwnTask], OwnAnswer]) -> None:
        self._evaluate = evaluate
        self._waiting: dict[int, OwnTask] = {}

    def submit(self, number: int, task: OwnTask) -> None:
        """See `Executor`."""
        self._waiting[number] = task

    def outcome(self, number: int) -> OwnAnswer:
        """See `Executor`."""
        return self._evaluate(self._waiting.pop(number))
