"""A back end for tests: runs the graph in PyTorch and reports synthetic times, the same on every machine.

The latency is affine in the number of weights, with a little seeded noise; nothing is measured.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from compressor.passes.trace import outputs_of
from compressor.runtime.timing import Sample, Timer
from compressor.target import Target


class Fake:
    """Builds `FakeEngine`s."""

    def build(self, graph: fx.GraphModule, example: Sequence[Tensor], target: Target) -> "FakeEngine":
        """No build at all."""
        del example, target
        return FakeEngine(graph)

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Nothing but its name."""
        return {"backend": "fake", "batch": target.batch}


class FakeEngine:
    """1 ms plus 0.1 us per weight, noise of half a percent."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self.mean_s = 1e-3 + 1e-7 * sum(p.numel() for p in graph.parameters())

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """Outputs of the graph in eval mode."""
        training = self._graph.training
        self._graph.eval()
        with torch.no_grad():
            outputs = outputs_of(self._graph(*[torch.from_numpy(np.asarray(x)) for x in inputs]))
        self._graph.train(training)
        return [x.numpy() for x in outputs]

    def timer(self) -> Timer:
        """Synthetic samples."""
        random = np.random.default_rng(0)

        def timer(count: int) -> Sample:
            wall = count * self.mean_s * float(random.normal(1.0, 0.005))
            return Sample(wall, wall, disturbed=False)

        return timer

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to free."""
