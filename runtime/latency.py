"""Measure graphs on a target: build, compare outputs with PyTorch, and only then time."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, fx

from compressor.errors import BackendError, DataError
from compressor.measurement import Measurement
from compressor.passes.trace import DYNAMIC, example_inputs_of, outputs_of
from compressor.passes.verify import relative_error
from compressor.runtime import BACKENDS
from compressor.runtime.base import Engine
from compressor.runtime.onnx_export import to_onnx
from compressor.runtime.onnxruntime import OnnxRuntimeEngine
from compressor.runtime.timing import Protocol, Timer, time_together
from compressor.store import write_bytes
from compressor.target import Target

logger = logging.getLogger(__name__)

PARITY = 1e-4
"""Relative error allowed between engine and PyTorch in float32. Other kernels sum in another order, and
normalisations folded into weights round once more: under 1e-6 on ResNet-56; a wrong graph is off by 1e-2 or more."""


def measure(
    graphs: Mapping[str, fx.GraphModule], target: Target, seed: int = 0, protocol: Protocol | None = None
) -> dict[str, Measurement]:
    """Latency of whole engines, timed together in one session.

    Args:
        graphs: Name -> traced graph.
        target: What to build for.
        seed: Of the inputs and of the order of the samples.
        protocol: Other numbers than the default ones.

    Raises:
        BackendError: An engine cannot be built, or its outputs differ from PyTorch's.
    """
    with ExitStack() as stack:
        timers = {name: _built(stack, graph, target, seed) for name, graph in graphs.items()}
        return time_together(timers, target.fingerprint(), seed, protocol)


class Comparison:
    """Candidates against one reference, whose engine is built once and timed anew beside each of them.

    Use as a context manager.

    Args:
        reference: The graph to compare with.
        target: What to build for.
        seed: Of the inputs and of the order of the samples.
    """

    def __init__(self, reference: fx.GraphModule, target: Target, seed: int = 0) -> None:
        self._reference = reference
        self._target = target
        self._seed = seed
        self._stack = ExitStack()
        self._timer: Timer | None = None

    def measure(self, candidate: fx.GraphModule) -> tuple[Measurement, Measurement]:
        """Latency of a candidate, and of the reference in the same session.

        Raises:
            BackendError: An engine cannot be built, or its outputs differ from PyTorch's.
        """
        if self._timer is None:
            self._timer = _built(self._stack, self._reference, self._target, self._seed)
        with ExitStack() as stack:
            timers = {"candidate": _built(stack, candidate, self._target, self._seed), "reference": self._timer}
            found = time_together(timers, self._target.fingerprint(), self._seed)
        return found["candidate"], found["reference"]

    def __enter__(self) -> Self:
        """The comparison itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the reference's engine."""
        self._stack.close()
        self._timer = None


def _built(stack: ExitStack, graph: fx.GraphModule, target: Target, seed: int) -> Timer:
    """Build an engine that lives as long as the stack, compare it with PyTorch, and return its timer."""
    example = example_for(graph, target, seed)
    engine = stack.enter_context(BACKENDS[target.backend]().build(graph, example, target))
    check_parity(engine, graph, example)
    return engine.timer()


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


def check_parity(engine: Engine, graph: fx.GraphModule, example: Sequence[Tensor]) -> float:
    """Compare an engine with PyTorch; returns the relative error.

    Raises:
        BackendError: It exceeds `PARITY`.
    """
    training = graph.training
    graph.eval()
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    with torch.no_grad():
        expected = outputs_of(graph(*[x.to(device) for x in example]))
    graph.train(training)
    found = engine.run([x.numpy() for x in example])
    error = relative_error([torch.from_numpy(np.asarray(x)) for x in found], expected)
    if not error <= PARITY:
        raise BackendError(
            f"the engine's outputs differ from PyTorch's by a relative {error:.2e} (allowed {PARITY:.0e}); it is not timed"
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


def check_run(folder: Path) -> float:
    """Compare the ONNX file of a run with its exported program; returns the relative error.

    Raises:
        DataError: The run is not finished.
        BackendError: They differ by more than `PARITY`.
    """
    program, model = folder / "program.pt2", folder / "model.onnx"
    for file in (program, model):
        if not file.exists():
            raise DataError(f"{folder} holds no {file.name}; is it a run, and is it finished?")
    loaded = torch.export.load(program)
    example = list(loaded.example_inputs[0]) if loaded.example_inputs else []
    with torch.no_grad():
        expected = outputs_of(loaded.module()(*example))
    with OnnxRuntimeEngine(model, example, Target()) as engine:
        found = [torch.from_numpy(np.asarray(x)) for x in engine.run([x.numpy() for x in example])]
    error = relative_error(found, expected)
    if not error <= PARITY:
        raise BackendError(f"{model} differs from {program} by a relative {error:.2e} (allowed {PARITY:.0e})")
    return error
