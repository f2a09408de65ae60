"""What a back end and an engine are, and the workload that goes from one to the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor, fx

from compressor.errors import BackendError
from compressor.runtime.onnx.precision import Int8, converted
from compressor.runtime.onnx.templates import Lowering
from compressor.runtime.timing.timers import Timer
from compressor.values.target import Option, Target

Arrays = list[NDArray[np.generic]]


@dataclass
class Workload:
    """A network that is to be built, as a traced graph, an ONNX model, or an engine file.

    Attributes:
        example: Inputs of the target's batch size, used for timing. Random numbers, never zeros: arithmetic on zeros
            is faster on some devices.
        graph: The traced graph, in eval mode where it matters; None for a network that came as ONNX.
        model: The ONNX model; None for a graph that is not lowered yet.
        calibration: Inputs that INT8 is calibrated on; without any, on random ones, which is enough for a latency
            and says nothing about accuracy.
        lowering: Shared by networks that differ in widths alone.
        fresh: Whether to lower by the exporter even where a template is known.
    """

    example: tuple[Tensor, ...]
    graph: fx.GraphModule | None = None
    model: onnx.ModelProto | None = None
    calibration: Sequence[tuple[Tensor, ...]] = ()
    lowering: Lowering = field(default_factory=Lowering)
    fresh: bool = False

    def onnx(self, precision: str = "fp32", form: Int8 | None = None) -> onnx.ModelProto:
        """The ONNX model at a precision; inputs and outputs are fp32 at all of them.

        Args:
            precision: `fp32`, `fp16` or `int8`.
            form: Which INT8; by default the one that TensorRT takes.

        Raises:
            BackendError: The exporter or the converter refuses it.
        """
        if self.model is None:
            if self.graph is None:
                raise BackendError("this workload holds neither a graph nor an ONNX model")
            self.model = self.lowering(self.graph, self.example, self.fresh)
        return converted(self.model, precision, self.calibration or [self.example], form)


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer of an engine, as the back end names and fuses it.

    Attributes:
        name: The back end's name.
        kind: Its type of layer (`Conv`, `Reformat`, …).
        median_ms: Median time of one run.
        modules: PyTorch modules (or ONNX nodes, where those are not known) that it computes.
    """

    name: str
    kind: str
    median_ms: float
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Health:
    """Whether a back end works on this machine.

    Attributes:
        works: Whether engines can be built *and* run.
        detail: Versions and device, or what was tried and failed.
        remedy: What to install or do; empty where it works.
    """

    works: bool
    detail: str
    remedy: str = ""


class Engine(Protocol):
    """A network built for a target. Use as a context manager: leaving it frees what it holds."""

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> Arrays:
        """Outputs for inputs of any batch size, in the order of the model's outputs."""

    def timer(self) -> Timer:
        """A function that runs the engine `n` times on fixed inputs of the target's batch and times it."""

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """Time per layer, from runs of their own; empty where the back end cannot tell."""

    def memory(self) -> dict[str, int]:
        """Bytes: `engine_bytes`, and `device_bytes` where the back end tells."""

    def __enter__(self) -> Self:
        """The engine itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Free what the engine holds."""


class Backend(Protocol):
    """Builds engines. Third-party packages are imported where used, their absence is a `BackendError`."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can build."""

    @property
    def options(self) -> Mapping[str, Option]:
        """Its options and their defaults."""

    def build(self, workload: Workload, target: Target) -> Engine:
        """Build an engine.

        Raises:
            BackendError: The back end is missing or refuses the network.
        """

    def fingerprint(self, target: Target) -> dict[str, object]:
        """Everything that a latency depends on besides the network and the target's own fields: device, versions."""

    def check(self) -> Health:
        """Try it on this machine."""
