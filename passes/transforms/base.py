"""What a pass is: a callable on a graph that says truthfully whether it changed it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import fx


class PassResult(NamedTuple):
    """A graph, and whether it differs from the one that went in."""

    graph: fx.GraphModule
    modified: bool


class Pass(Protocol):
    """A rewrite of a traced graph. It takes what it needs in its constructor and leaves its argument alone."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return the rewritten graph; raise `PassError` or `PlanError` with a reason where it refuses."""


class Sequential:
    """Passes one after the other; itself a pass.

    Args:
        passes: In order.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = tuple(passes)

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run them all; modified if any of them was."""
        modified = False
        for one in self._passes:
            gm, changed = one(gm)
            modified = modified or changed
        return PassResult(gm, modified)
