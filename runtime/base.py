"""What a back end and an engine are."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from compressor.runtime.timing import Timer
from compressor.target import Target


class Engine(Protocol):
    """A network built for a target. Use as a context manager: leaving it frees what it holds."""

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """Outputs for inputs of any batch size, in the order of the model's outputs."""

    def timer(self) -> Timer:
        """A function that runs the engine `n` times on fixed inputs of the target's batch and times it."""

    def __enter__(self) -> Self:
        """The engine itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Free what the engine holds."""


class Backend(Protocol):
    """Builds engines. Third-party packages are imported in `build`, their absence is a `BackendError`."""

    def build(self, graph: fx.GraphModule, example: Sequence[Tensor], target: Target) -> Engine:
        """Build an engine from a traced graph.

        Args:
            graph: The graph, as it is to run (in eval mode).
            example: Inputs of the target's batch size, used for timing.
            target: The target.

        Raises:
            BackendError: The back end is missing or refuses the graph.
        """

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Everything that a latency depends on besides the network: device, versions, settings."""
