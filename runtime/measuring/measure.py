"""Measure graphs on a target: build, compare outputs with PyTorch, and only then time."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, fx

from compressor.errors import BackendError
from compressor.passes.tracing.modes import full_float32
from compressor.passes.tracing.trace import DYNAMIC, device_of, example_inputs_of, outputs_of
from compressor.passes.transforms.verify import relative_error
from compressor.runtime.backends import BACKENDS
from compressor.runtime.backends.base import Engine, LayerTime, Workload
from compressor.runtime.backends.fake import Fake
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine
from compressor.runtime.backends.sentinel import sentinel_workload
from compressor.runtime.onnx.export import to_onnx
from compressor.runtime.onnx.precision import PARITY
from compressor.runtime.onnx.templates import Lowering
from compressor.runtime.timing.clocks import Source, cpu_source, nvml_source
from compressor.runtime.timing.protocol import Protocol, Timer, time_together
from compressor.values.files import write_bytes
from compressor.values.measurement import Measurement
from compressor.values.target import Target

logger = logging.getLogger(__name__)


def measure(
    graphs: Mapping[str, fx.GraphModule],
    target: Target,
    seed: int = 0,
    protocol: Protocol | None = None,
    calibration: Sequence[tuple[Tensor, ...]] = (),
) -> dict[str, Measurement]:
    """Latency of whole engines, timed together in one session, a sentinel beside them.

    Args:
        graphs: Name -> traced graph.
        target: What to build for.
        seed: Of the inputs and of the order of the samples.
        protocol: Other numbers than the default ones.
        calibration: Inputs that INT8 is calibrated on; see `Workload`.

    Raises:
        BackendError: An engine cannot be built, or its outputs differ from PyTorch's.
    """
    lowering = Lowering()
    with ExitStack() as stack:
        engines = {name: built(stack, graph, target, seed, lowering, calibration) for name, graph in graphs.items()}
        timers = {name: engine.timer() for name, engine in engines.items()}
        sentinel = sentinel_timer(stack, target)
        return time_together(timers, target.fingerprint(), seed, protocol, sentinel=sentinel, clocks=clocks_of(target))


class Comparison:
    """Candidates against one reference, whose engine is built once and timed anew beside each of them.

    Use as a context manager. Candidates are one network with other widths: from the third on they are lowered
    without the exporter (`runtime/onnx/templates.py`).

    Args:
        reference: The graph to compare with.
        target: What to build for.
        seed: Of the inputs and of the order of the samples.
        protocol: Other numbers than the default ones.
    """

    def __init__(self, reference: fx.GraphModule, target: Target, seed: int = 0, protocol: Protocol | None = None) -> None:
        self._reference = reference
        self._target = target
        self._seed = seed
        self._protocol = protocol
        self._stack = ExitStack()
        self._timer: Timer | None = None
        self._lowering = Lowering()
        self._fingerprint = target.fingerprint()

    def measure(self, candidate: fx.GraphModule) -> tuple[Measurement, Measurement]:
        """Latency of a candidate, and of the reference in the same session.

        Raises:
            BackendError: An engine cannot be built, or its outputs differ from PyTorch's.
        """
        return self._found(candidate, layers=False)[:2]

    def examine(self, candidate: fx.GraphModule) -> tuple[Measurement, Measurement, list[LayerTime]]:
        """The same, and the candidate's time per layer.

        Raises:
            BackendError: An engine cannot be built, or its outputs differ from PyTorch's.
        """
        return self._found(candidate, layers=True)

    def _found(self, candidate: fx.GraphModule, layers: bool) -> tuple[Measurement, Measurement, list[LayerTime]]:
        if self._timer is None:
            self._timer = built(self._stack, self._reference, self._target, self._seed, self._lowering).timer()
        with ExitStack() as stack:
            engine = built(stack, candidate, self._target, self._seed, self._lowering)
            timers = {"candidate": engine.timer(), "reference": self._timer}
            clocks = clocks_of(self._target)
            found = time_together(timers, self._fingerprint, self._seed, self._protocol, clocks=clocks)
            return found["candidate"], found["reference"], engine.layers() if layers else []

    def __enter__(self) -> Self:
        """The comparison itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the reference's engine."""
        self._stack.close()
        self._timer = None


def built(
    stack: ExitStack,
    graph: fx.GraphModule,
    target: Target,
    seed: int = 0,
    lowering: Lowering | None = None,
    calibration: Sequence[tuple[Tensor, ...]] = (),
) -> Engine:
    """Build an engine that lives as long as the stack, and compare it with PyTorch.

    Raises:
        BackendError: It cannot be built, or its outputs differ from PyTorch's.
    """
    example = example_for(graph, target, seed)
    workload = Workload(example, graph, calibration=calibration, lowering=lowering or Lowering())
    probe = calibration[0] if calibration else example
    written = workload.lowering.written
    try:
        return _compared(stack, workload, graph, target, probe)
    except BackendError:
        if workload.lowering.written == written:
            raise
        logger.info("what the template gave does not hold; lowering anew by the exporter")
        workload = Workload(example, graph, calibration=calibration, lowering=workload.lowering, fresh=True)
        return _compared(stack, workload, graph, target, probe)


def _compared(stack: ExitStack, workload: Workload, graph: fx.GraphModule, target: Target, probe: Sequence[Tensor]) -> Engine:
    with ExitStack() as own:
        engine = own.enter_context(BACKENDS[target.backend]().build(workload, target))
        size = max(target.batch, 1)
        check_parity(engine, graph, [x[:size] for x in probe], PARITY[target.precision])
        stack.push(own.pop_all())
    return engine


def sentinel_timer(stack: ExitStack, target: Target) -> Timer | None:
    """A timer of the sentinel on a target's back end and device, at its precision's batch 1; None for synthetic clocks."""
    if isinstance(BACKENDS[target.backend](), Fake):
        return None
    options = {**target.options, **({"max_batch": 0} if "max_batch" in target.options else {})}
    plain = Target(target.backend, 1, target.threads, precision="fp32", options=options)
    return stack.enter_context(BACKENDS[target.backend]().build(sentinel_workload(), plain)).timer()


def clocks_of(target: Target) -> Source | None:
    """Where the clock of a target's device can be read."""
    if isinstance(BACKENDS[target.backend](), Fake):
        return None
    on_cpu = target.backend == "onnxruntime" or target.options.get("device") == "cpu"
    return cpu_source() if on_cpu else nvml_source(0)


def example_for(graph: fx.GraphModule, target: Target, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the target's batch size.

    Raises:
        BackendError: The graph's batch is fixed at another size.
    """
    example = example_inputs_of(graph, target.batch, seed)
    traced = example_inputs_of(graph)
    if not graph.meta[DYNAMIC] and example[0].shape != traced[0].shape:
        raise BackendError(
            f"this model allows no other batch size than {traced[0].shape[0]}, the target asks for {target.batch}; "
            "trace it with example inputs of that batch size"
        )
    return example


def check_parity(engine: Engine, graph: fx.GraphModule, example: Sequence[Tensor], tolerance: float = PARITY["fp32"]) -> float:
    """Compare an engine with PyTorch in float32; returns the relative error.

    Raises:
        BackendError: It exceeds the tolerance; those of the precisions are in `PARITY`.
    """
    training = graph.training
    graph.eval()
    with full_float32(), torch.no_grad():
        expected = outputs_of(graph(*[x.to(device_of(graph)) for x in example]))
    graph.train(training)
    found = engine.run([x.numpy() for x in example])
    error = relative_error([torch.from_numpy(np.asarray(x)) for x in found], expected)
    if not error <= tolerance:
        raise BackendError(
            f"the engine's outputs differ from PyTorch's by a relative {error:.2e} (allowed {tolerance:.0e}); it is not timed"
        )
    logger.info("parity: engine = PyTorch within %.1e", error)
    return error


def export_checked(graph: fx.GraphModule, path: Path) -> float:
    """Write a graph as ONNX if ONNX Runtime gives PyTorch's outputs; returns the relative error.

    Raises:
        BackendError: The exporter refuses the graph, or the outputs differ; `path` is as it was.
        DataError: The file cannot be written.
    """
    model = to_onnx(graph, example_inputs_of(graph)).SerializeToString()
    error = check_onnx(model, graph)
    write_bytes(path, model)
    return error


def check_onnx(model: bytes | Path, graph: fx.GraphModule) -> float:
    """Compare an ONNX model, serialized or a file, with a graph at two batch sizes; returns the larger relative error.

    Raises:
        BackendError: It exceeds `PARITY`.
    """
    batches = (1, 3) if graph.meta[DYNAMIC] else (None,)
    worst = 0.0
    for batch in batches:
        example = example_inputs_of(graph, batch)
        with OnnxRuntimeEngine(model, example, Target()) as engine:
            worst = max(worst, check_parity(engine, graph, example))
    return worst
