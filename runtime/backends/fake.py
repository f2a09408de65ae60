"""A back end for tests: runs the graph in PyTorch and reports times of a synthetic clock, the same on every machine.

The latency of a network is 1 ms plus that of its layers, 0.1 us per weight; with the option `step` a layer costs as
much as with its channels rounded up to a multiple of `step`, the staircase of real devices. The clock's
noise, drift, spikes and throttling are options as well. Nothing is measured.
"""

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from compressor.errors import BackendError
from compressor.passes.tracing.trace import device_of, outputs_of
from compressor.runtime.backends.base import Arrays, Health, LayerTime, Workload
from compressor.runtime.timing.timers import Sample, Timer
from compressor.values.target import Option, Target


class Fake:
    """Builds `FakeEngine`s."""

    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    options: Mapping[str, Option] = {
        "noise": 0.005,  # standard deviation of a sample, relative
        "drift": 0.0,  # relative change over 1,000 samples
        "spikes": 0.0,  # share of samples that take three times as long and are marked as disturbed
        "throttling": 0.0,  # share of samples at half the clock
        "step": 1,  # channels of a staircase's step
        "seed": 0,
    }

    def build(self, workload: Workload, target: Target) -> "FakeEngine":
        """No build at all."""
        if workload.graph is None:
            raise BackendError("the back end `fake` runs PyTorch graphs only")
        return FakeEngine(workload.graph, target)

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Nothing: the target's own fields say it all."""
        del target
        return {}

    def check(self) -> Health:
        """Always works."""
        return Health(True, "synthetic times, for tests")


class FakeEngine:
    """See the module."""

    def __init__(self, graph: fx.GraphModule, target: Target) -> None:
        self._graph, self._options = graph, target.options
        self._seconds = {name: 1e-7 * _weights(module, int(target.options["step"])) for name, module in _layers(graph)}
        speed = {"fp32": 1.0, "fp16": 0.6, "int8": 0.4}[target.precision]
        self.mean_s = speed * (1e-3 + sum(self._seconds.values()))

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> Arrays:
        """Outputs of the graph in eval mode."""
        training = self._graph.training
        self._graph.eval()
        with torch.no_grad():
            outputs = outputs_of(self._graph(*[torch.from_numpy(np.asarray(x)).to(device_of(self._graph)) for x in inputs]))
        self._graph.train(training)
        return [x.cpu().numpy() for x in outputs]

    def timer(self) -> Timer:
        """Synthetic samples."""
        setting = {name: float(value) for name, value in self._options.items()}
        random = np.random.default_rng(int(setting["seed"]))
        taken = 0

        def timer(count: int) -> Sample:
            nonlocal taken
            taken += 1
            mean = count * self.mean_s * (1 + setting["drift"] * taken / 1000)
            cpu = mean * max(float(random.normal(1.0, setting["noise"])), 0.05)
            spike, slow = random.random() < setting["spikes"], random.random() < setting["throttling"]
            clock = 700.0 if slow else 1400.0
            return Sample(cpu * (3 if spike else 1) * (2 if slow else 1), cpu, spike, mhz=clock, slowed=slow)

        return timer

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """The terms of the latency."""
        del runs
        return [LayerTime(name, "layer", 1e3 * seconds, (name,)) for name, seconds in self._seconds.items()]

    def memory(self) -> dict[str, int]:
        """Bytes of the weights."""
        return {"engine_bytes": sum(p.numel() * p.element_size() for p in self._graph.parameters())}

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to free."""


def _layers(graph: fx.GraphModule) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in graph.named_modules() if list(module.parameters(recurse=False))]


def _weights(module: nn.Module, step: int) -> int:
    """Elements of the parameters, their channel axes rounded up."""
    rounded = (0,) if getattr(module, "groups", 1) > 1 else (0, 1)  # a depthwise weight has one input channel
    total = 0
    for tensor in module.parameters(recurse=False):
        sizes = [math.ceil(size / step) * step if axis in rounded else size for axis, size in enumerate(tensor.shape)]
        total += math.prod(sizes)
    return total
