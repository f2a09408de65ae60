"""How long work tells what it is doing. The library is silent; a caller passes something that shows it."""


class Progress:
    """Shows nothing; subclass to show something."""

    def stage(self, text: str) -> None:
        """A new step begins."""

    def tick(self, done: int, total: int | None, text: str) -> None:
        """`done` of `total` units of the step are finished (None: nobody knows how many there are)."""
