"""Profiling: every combination of precision and batch of a network, timed together on one back end."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from compressor.errors import BackendError, DataError
from compressor.passes.channels.analyze import digest_of_graph
from compressor.passes.tracing.trace import INPUTS
from compressor.passes.transforms.verify import relative_error
from compressor.runtime.backends import BACKENDS, Engine, Workload
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine
from compressor.runtime.backends.tensorrt import TensorRT
from compressor.runtime.measuring.measure import check_parity, clocks_of, example_for, sentinel_timer
from compressor.runtime.measuring.profile_records import Profiled
from compressor.runtime.measuring.store import MeasurementStore
from compressor.runtime.onnx.precision import PARITY
from compressor.runtime.onnx.templates import Lowering
from compressor.runtime.timing.protocol import PROTOCOL, Protocol, time_together
from compressor.tasks.samples import Batches, samples_of
from compressor.training.evaluate import Score, counted
from compressor.values.measurement import Measurement
from compressor.values.plan import digest_of
from compressor.values.progress import Progress
from compressor.values.target import Target

logger = logging.getLogger(__name__)

ENGINE_SUFFIXES = (".plan", ".engine", ".trt")
CALIBRATION_BATCHES = 8


@dataclass
class Network:
    """What is profiled: a traced graph, an ONNX model, or an engine file.

    Attributes:
        name: For titles.
        graph: The graph.
        model: The ONNX model.
        engine: The engine file.
        shapes: Input shapes with batch, for an ONNX model whose sizes are not fixed.
        lowering: Shared by all precisions and batches.
    """

    name: str
    graph: fx.GraphModule | None = None
    model: onnx.ModelProto | None = None
    engine: Path | None = None
    shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """One template for all."""
        self.lowering = Lowering()

    @property
    def graph_hash(self) -> str:
        """Digest of structure and shapes."""
        if self.graph is not None:
            return digest_of_graph(self.graph)
        if self.model is not None:
            nodes = [[n.op_type, list(n.input), list(n.output)] for n in self.model.graph.node]
            return digest_of([nodes, [[i.name, list(i.dims)] for i in self.model.graph.initializer]])
        assert self.engine is not None
        return digest_of(self.engine.read_bytes().hex())

    def workload(self, batch: int, calibration: Sequence[tuple[Tensor, ...]]) -> Workload:
        """The workload at a batch size.

        Raises:
            BackendError: The network's batch is fixed at another size.
        """
        if self.graph is not None:
            return Workload(
                example_for(self.graph, Target(batch=batch)), self.graph, calibration=calibration, lowering=self.lowering
            )
        assert self.model is not None
        return Workload(onnx_inputs(self.model, batch, self.shapes), model=self.model, calibration=calibration)


def onnx_inputs(model: onnx.ModelProto, batch: int, shapes: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, ...]:
    """Random inputs for an ONNX model.

    Raises:
        BackendError: Its batch is fixed at another size, or a size is neither fixed nor given.
    """
    generator = torch.Generator().manual_seed(0)
    stored = {item.name for item in model.graph.initializer}
    result = []
    for k, item in enumerate(i for i in model.graph.input if i.name not in stored):
        sizes = [d.dim_value or None for d in item.type.tensor_type.shape.dim]
        given = shapes[k] if k < len(shapes) else None
        if given is not None and (
            len(given) != len(sizes) or any(s not in (None, g) for s, g in zip(sizes[1:], given[1:], strict=True))
        ):
            raise BackendError(f"input {item.name} has shape {sizes}, --shape gives {list(given)}")
        if sizes and sizes[0] not in (None, batch):
            raise BackendError(f"the model's batch is fixed at {sizes[0]}, {batch} was asked for; export it with a dynamic batch")
        rest = [s or (given[a] if given is not None else None) for a, s in enumerate(sizes) if a]
        if None in rest:
            raise BackendError(f"input {item.name} has sizes that are not fixed ({sizes}); give its --shape")
        kind = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
        values = torch.randn([batch, *[int(s) for s in rest if s is not None]], generator=generator)
        result.append(values if kind == np.float32 else torch.from_numpy(values.abs().numpy().astype(kind)))
    return tuple(result)


def profile_network(
    network: Network,
    targets: Sequence[Target],
    *,
    data: Batches | None = None,
    layers: bool = False,
    protocol: Protocol | None = None,
    seed: int = 0,
    store: MeasurementStore | None = None,
    progress: Progress | None = None,
) -> list[Profiled]:
    """Build, compare, time together, and look into every engine.

    Args:
        network: What.
        targets: On what; all of one back end, differing in batch and precision.
        data: Labelled batches: INT8 is calibrated on the first of them and accuracy measured on all.
        layers: Whether to time layers too.
        protocol: Of the timing.
        seed: Of inputs and order.
        store: Where the measurements are kept, besides being returned.
        progress: Where to say how far it is.

    Returns:
        One per target, in their order; what fails is in it with its reason.
    """
    show = progress or Progress()
    with ExitStack() as stack:
        built: list[tuple[Profiled, Engine | None]] = []
        for k, target in enumerate(targets):
            show.tick(k, len(targets), f"building {target.precision}, batch {target.batch}")
            built.append(_build(stack, network, target, data))
        show.tick(len(targets), len(targets), "built")
        alive = {str(k): engine for k, (_, engine) in enumerate(built) if engine is not None}
        if not alive:
            return [found for found, _ in built]
        show.stage(f"timing {len(alive)} engines together")
        timers = {name: engine.timer() for name, engine in alive.items()}
        sentinel = sentinel_timer(stack, targets[0])
        times = time_together(timers, {}, seed, protocol, sentinel=sentinel, clocks=clocks_of(targets[0]))
        result = []
        for k, (found, engine) in enumerate(built):
            if engine is None:
                result.append(found)
                continue
            show.tick(k, len(built), "layers and accuracy" if layers or data else "reading")
            result.append(_looked_into(found, engine, times[str(k)], layers, data))
            measurement = result[-1].measurement
            if store is not None and measurement is not None:
                store.put(found.graph_hash, measurement, PROTOCOL)
        show.tick(len(built), len(built), "done")
        return result


def _build(stack: ExitStack, network: Network, target: Target, data: Batches | None) -> tuple[Profiled, Engine | None]:
    empty = Profiled(target, network.graph_hash, {})
    begun = time.monotonic()
    try:
        if network.engine is not None:
            return _load_engine(stack, network.engine, target, empty)
        calibration = calibration_of(data, target.batch)
        workload = network.workload(target.batch, calibration)
        engine = stack.enter_context(BACKENDS[target.backend]().build(workload, target))
        seconds = time.monotonic() - begun
        parity = _parity(network, engine, workload, target)
    except BackendError as error:
        return replace(empty, failure=str(error)), None
    notes = []
    if target.precision == "int8" and not calibration:
        notes.append("INT8 was calibrated on random inputs: good for the latency, meaningless for accuracy; give --data")
    if target.precision == "fp16" and target.backend == "onnxruntime":
        notes.append("ONNX Runtime computes most FP16 layers in FP32 on CPUs: expect no gain here")
    shapes = {name: tuple(x.shape) for name, x in zip(_input_names(network), workload.example, strict=True)}
    return replace(empty, inputs=shapes, parity=parity, build_s=seconds, notes=tuple(notes)), engine


def _load_engine(stack: ExitStack, file: Path, target: Target, empty: Profiled) -> tuple[Profiled, Engine | None]:
    backend = BACKENDS[target.backend]()
    if not isinstance(backend, TensorRT):
        raise BackendError(f"{file.name} is an engine of TensorRT; use --target tensorrt or tensorrt-rtx")
    engine = stack.enter_context(backend.load(file, target))
    shapes = {str(t["name"]): tuple(t["profile"][1]) for t in engine.tensors if t["input"]}
    return replace(empty, inputs=shapes, notes=("an engine file: its outputs were compared with nothing",)), engine


def _parity(network: Network, engine: Engine, workload: Workload, target: Target) -> float:
    """Compare with PyTorch, or with ONNX Runtime in fp32 where there is only ONNX."""
    tolerance = PARITY[target.precision]
    probe = [x[: target.batch] for x in (workload.calibration[0] if workload.calibration else workload.example)]
    if network.graph is not None:
        return check_parity(engine, network.graph, probe, tolerance)
    assert network.model is not None
    with OnnxRuntimeEngine(network.model.SerializeToString(), probe, Target()) as reference:
        expected = [torch.from_numpy(np.asarray(y)) for y in reference.run([x.numpy() for x in probe])]
    found = [torch.from_numpy(np.array(y)) for y in engine.run([x.numpy() for x in probe])]
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise BackendError(
            f"the engine's outputs differ from ONNX Runtime's by a relative {error:.2e} (allowed {tolerance:.0e}); it is not timed"
        )
    return error


def _looked_into(found: Profiled, engine: Engine, times: Measurement, layers: bool, data: Batches | None) -> Profiled:
    measurement = replace(times, target=found.target.fingerprint())
    try:
        inside = tuple(engine.layers()) if layers else ()
        accuracy = engine_metric(engine, data, found.target.batch).value if data is not None else None
    except BackendError as error:
        return replace(found, measurement=measurement, memory=engine.memory(), notes=(*found.notes, str(error)))
    return replace(found, measurement=measurement, memory=engine.memory(), layers=inside, accuracy=accuracy)


def engine_metric(engine: Engine, data: Batches, batch: int) -> Score:
    """The metric of an engine, in portions of its batch; the last one is filled up and the filling not counted.

    Raises:
        DataError: There are no batches, they are not what the task reads, or its metric is a function that runs the network.
    """
    samples = samples_of(data)
    metric = samples.task.metric
    if metric.meter is None:
        raise DataError(f"{metric.name} runs a network itself; an engine is judged by a metric that counts over batches")
    meter, count = metric.meter(), 0
    for sample in samples.read("the metric"):
        found: list[list[np.ndarray]] = []
        for start in range(0, sample.count, batch):
            parts = [x[start : start + batch] for x in sample.inputs]
            left = len(parts[0])
            filled = [torch.cat([x, x[:1].expand(batch - left, *x.shape[1:])]) if left < batch else x for x in parts]
            found.append([np.asarray(out)[:left] for out in engine.run([x.contiguous().numpy() for x in filled])])
        outputs = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True)]
        counted(meter, sample, outputs[0] if len(outputs) == 1 else tuple(outputs))
        count += sample.count
    if not count:
        raise DataError("there is no validation data: the loader yields no batch")
    return Score(metric.value(meter), count)


def calibration_of(data: Batches | None, batch: int) -> list[tuple[Tensor, ...]]:
    """Inputs for INT8 from the first batches of the data, in portions of the batch that is built."""
    if data is None:
        return []
    portions: list[tuple[Tensor, ...]] = []
    for sample in islice(samples_of(data).read("calibration"), CALIBRATION_BATCHES):
        starts = range(0, sample.count - batch + 1, batch)
        portions += [tuple(x[start : start + batch] for x in sample.inputs) for start in starts]
    return portions[: max(256 // batch, 8)]


def _input_names(network: Network) -> list[str]:
    if network.graph is not None:
        return [str(n.target) for n in network.graph.graph.nodes if n.op == "placeholder"][: len(network.graph.meta[INPUTS])]
    assert network.model is not None
    stored = {item.name for item in network.model.graph.initializer}
    return [item.name for item in network.model.graph.input if item.name not in stored]


def as_files(found: Sequence[Profiled]) -> Mapping[str, np.ndarray]:
    """Raw samples by name, for an `.npz` file."""
    return {
        f"{p.target.backend}-{p.target.precision}-b{p.target.batch}": np.asarray(p.measurement.raw_ms)
        for p in found
        if p.measurement is not None
    }
