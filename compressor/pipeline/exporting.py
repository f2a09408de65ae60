"""Export: engines with their manifests, and model repositories for Triton."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from compressor.errors import BackendError, DataError
from compressor.passes.channels.analyze import digest_of_graph
from compressor.passes.tracing.trace import example_inputs_of, outputs_of
from compressor.passes.transforms.verify import relative_error
from compressor.pipeline.loading import network_of_run, onnx_of_run, run_network
from compressor.pipeline.profiling import calibration_of, engine_metric, onnx_inputs
from compressor.runs.folder import versions
from compressor.runtime.backends import BACKENDS, Engine, Workload
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine, int8_form
from compressor.runtime.backends.tensorrt import TensorRT
from compressor.runtime.engines.manifest import Manifest, load_engine, specs_of
from compressor.runtime.engines.triton import Serving, perf_analyzer_command, safe_name, write_repository
from compressor.runtime.measuring.measure import clocks_of, sentinel_timer
from compressor.runtime.onnx.export import to_onnx
from compressor.runtime.onnx.precision import PARITY, converted
from compressor.runtime.timing.protocol import Protocol, time_together
from compressor.tasks.samples import Batches
from compressor.values.files import digest_of_file, digest_of_tensors, replacing, write_bytes
from compressor.values.measurement import Measurement
from compressor.values.progress import Progress
from compressor.values.target import Target

FORMATS = {"onnx": "fp32", "onnx-fp16": "fp16", "onnx-int8": "int8", "tensorrt": "", "triton": ""}
_EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Exportable:
    """A network that can be exported.

    Attributes:
        name: The user's name for it.
        model: Its ONNX model in fp32.
        reference: PyTorch's outputs for inputs.
        dynamic: Whether it takes any batch size.
        digests: Of architecture and weights.
    """

    name: str
    model: onnx.ModelProto
    reference: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    dynamic: bool
    digests: dict[str, object]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The engine file, or the model's folder in a repository.
        manifest: Its manifest.
        measurement: Its latency, where it could run here.
        commands: Ready to run: the server, the load generator, TensorRT's own tool.
    """

    path: Path
    manifest: Manifest
    measurement: Measurement | None
    commands: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """What was found out about an engine; nothing where it cannot run here."""

    parity: float | None = None
    latency: Measurement | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class _Job:
    """What is asked for; see `export_engine`."""

    source: Exportable
    kind: str
    path: Path
    target: Target
    data: Batches | None
    protocol: Protocol | None
    show: Progress
    rebuild: str


def from_run(folder: Path) -> Exportable:
    """The compressed network of a run.

    Raises:
        DataError: The run is not finished, or a file is damaged.
    """
    file, network = folder / "model.onnx", network_of_run(folder)
    model = onnx.load_from_string(onnx_of_run(folder))
    inputs, _ = specs_of(model)
    weights = digest_of_tensors(network.state_dict())
    digests: dict[str, object] = {"run": folder.name, "weights": weights, "onnx": digest_of_file(file)}
    return Exportable(folder.resolve().name, model, lambda x: run_network(network, x), inputs[0].shape[:1] == (-1,), digests)


def from_graph(graph: fx.GraphModule, name: str) -> Exportable:
    """A traced graph, in eval mode.

    Raises:
        BackendError: It cannot be lowered to ONNX.
    """
    model = to_onnx(graph, example_inputs_of(graph))
    inputs, _ = specs_of(model)
    digests: dict[str, object] = {"architecture": digest_of_graph(graph), "weights": digest_of_tensors(graph.state_dict())}
    return Exportable(name, model, lambda x: outputs_of(graph(*x)), inputs[0].shape[:1] == (-1,), digests)


def export_engine(
    source: Exportable,
    form: str,
    out: Path,
    *,
    target: Target | None = None,
    name: str | None = None,
    data: Batches | None = None,
    serving: Serving | None = None,
    protocol: Protocol | None = None,
    rebuild: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write an engine and its manifest, after comparing it with PyTorch and measuring it.

    Args:
        source: The network.
        form: `onnx`, `onnx-fp16`, `onnx-int8`, `tensorrt`, or `triton`: a model repository that holds, by the target, an
            ONNX model or a TensorRT engine at the target's precision.
        out: The folder; for `triton` the repository.
        target: Where latency is measured, and what TensorRT builds for.
        name: Name of the file, or of the model in the repository; made safe.
        data: Labelled batches: INT8 is calibrated on the first of them, accuracy measured on all.
        serving: How the server is to run the model, for `triton`.
        protocol: Of the timing.
        rebuild: The command that builds it anew, for the manifest; by default one with the source's name.
        progress: Where to say what is being done.

    Raises:
        BackendError: The network cannot be built in this form, or differs from PyTorch; nothing is written then.
        DataError: The folder cannot be written to, or the form is not known.
    """
    if form not in FORMATS:
        raise DataError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
    wanted = target or Target()
    kind = _kind_of(form, wanted)
    label = safe_name(name or source.name)
    show = progress or Progress()
    suffix = ".plan" if kind == "tensorrt" else ".onnx"
    how = f" --target {wanted.backend} --precision {wanted.precision}" if form in ("tensorrt", "triton") else ""
    again = rebuild or f"compressor export {shlex.quote(source.name)} --format {form}{how} --out {shlex.quote(str(out))}"
    if form != "triton":
        return _engine(_Job(source, kind, out / f"{label}{suffix}", wanted, data, protocol, show, again))
    if kind == "tensorrt" and wanted.backend != "tensorrt":
        raise BackendError("Triton serves engines of TensorRT, not of TensorRT-RTX: use --target tensorrt, or an ONNX repository")
    settings = serving or Serving(max_batch=8 if source.dynamic else 0)
    if kind == "tensorrt":
        wanted = replace(wanted, options={**wanted.options, "max_batch": max(settings.max_batch, wanted.batch)})
    made = _engine(_Job(source, kind, out / f".{label}.engine" / f"{label}{suffix}", wanted, data, protocol, show, again))
    show.stage("model repository")
    try:
        folder = write_repository(made.path, out, label, replace(settings, gpu=settings.gpu or kind == "tensorrt"))
    finally:
        for file in made.path.parent.iterdir():
            file.unlink()
        made.path.parent.rmdir()
    commands = (f"tritonserver --model-repository {shlex.quote(str(out))}", perf_analyzer_command(folder.name, settings))
    return Exported(folder, made.manifest, made.measurement, commands)


def _kind_of(form: str, target: Target) -> str:
    """The engine's own format."""
    if form != "triton":
        return form
    if target.backend.startswith("tensorrt"):
        return "tensorrt"
    return {"fp32": "onnx", "fp16": "onnx-fp16", "int8": "onnx-int8"}.get(target.precision, "onnx")


def _engine(job: _Job) -> Exported:
    return _tensorrt(job) if job.kind == "tensorrt" else _onnx(job)


def _onnx(job: _Job) -> Exported:
    source, show = job.source, job.show
    here = Target(batch=job.target.batch, threads=job.target.threads, precision=FORMATS[job.kind])
    example = _example(source, here)
    show.stage(f"{job.kind}: convert and compare with PyTorch")
    calibration = calibration_of(job.data, here.batch) or [example]
    form = int8_form() if job.target.backend == "onnxruntime" else None
    model = converted(source.model, here.precision, calibration, form).SerializeToString()
    with OnnxRuntimeEngine(model, example, here) as engine:
        seen = _look(job, engine, here, calibration[0])
    write_bytes(job.path, model)
    return _finish(job, here, seen, max_batch=0)


def _tensorrt(job: _Job) -> Exported:
    source, target, show = job.source, job.target, job.show
    backend = BACKENDS[target.backend]()
    if not isinstance(backend, TensorRT):
        raise BackendError(f"the format tensorrt needs --target tensorrt or tensorrt-rtx, found {target.backend}")
    example = _example(source, target)
    show.stage(f"{target.backend}: build for batch {backend.profile(target)} at {target.precision}")
    workload = Workload(example, model=source.model, calibration=calibration_of(job.data, target.batch))
    seen = _Seen()
    with replacing(job.path) as file:  # an engine that differs from PyTorch never takes the place of another
        backend.compile(workload, target, file, progress=lambda phase, step, steps: show.tick(step, steps or None, phase))
        if backend.check().works:
            with backend.load(file, target, workload.onnx(target.precision)) as engine:
                seen = _look(job, engine, target, example)
    return _finish(job, target, seen, max_batch=backend.profile(target)[2])


def _look(job: _Job, engine: Engine, target: Target, probe: Sequence[Tensor]) -> _Seen:
    """Compare with PyTorch first; then latency and accuracy."""
    error = _compare(job.source, engine, probe, target.precision)
    return _Seen(error, _measured(engine, target, job.protocol, job.show), _accuracy(job, engine, target))


def _finish(job: _Job, target: Target, seen: _Seen, max_batch: int) -> Exported:
    source, kind, path = job.source, job.kind, job.path
    inputs, outputs = specs_of(source.model)
    manifest = Manifest(
        file=path.name, sha256=digest_of_file(path), form=kind, target=target.to_dict(), fingerprint=target.fingerprint(),
        inputs=inputs, outputs=outputs, source={"name": source.name, **source.digests}, versions=versions(), parity=seen.parity,
        latency={} if seen.latency is None else {**seen.latency.summary(), "status": seen.latency.status}, accuracy=seen.accuracy,
        max_batch=max_batch, rebuild=job.rebuild,
    )  # fmt: skip
    manifest.write(path.parent)
    shapes = ",".join(f"{t.name}:{'x'.join(str(target.batch if s < 0 else s) for s in t.shape)}" for t in inputs)
    trtexec = (
        f"trtexec --onnx={shlex.quote(str(path))} --shapes={shapes} --warmUp=200 --duration=5 --useCudaGraph --noDataTransfers"
    )
    return Exported(
        path, manifest, seen.latency, (trtexec,) if kind != "tensorrt" else (trtexec.replace("--onnx", "--loadEngine"),)
    )


def _example(source: Exportable, target: Target) -> tuple[Tensor, ...]:
    fixed = specs_of(source.model)[0][0].shape[0]
    batch = target.batch if source.dynamic else fixed
    return onnx_inputs(source.model, batch)


def _compare(source: Exportable, engine: Engine, probe: Sequence[Tensor], precision: str) -> float:
    with torch.no_grad():
        expected = source.reference(probe)
    found = [torch.from_numpy(np.array(y)) for y in engine.run([x.numpy() for x in probe])]
    error = relative_error(found, expected)
    if not error <= PARITY[precision]:
        raise BackendError(
            f"the {precision} engine's outputs differ from PyTorch's by a relative {error:.2e} (allowed {PARITY[precision]:.0e}); "
            "it is not exported"
        )
    return error


def _measured(engine: Engine, target: Target, protocol: Protocol | None, show: Progress) -> Measurement:
    show.stage("measure")
    with ExitStack() as stack:
        sentinel = sentinel_timer(stack, target)
        timers = {"engine": engine.timer()}
        return time_together(timers, target.fingerprint(), 0, protocol, sentinel=sentinel, clocks=clocks_of(target))["engine"]


def _accuracy(job: _Job, engine: Engine, target: Target) -> float | None:
    if job.data is None:
        return None
    job.show.stage("accuracy")
    on_cpu = target.backend == "onnxruntime" and job.source.dynamic
    return engine_metric(engine, job.data, _EVALUATION_BATCH if on_cpu else target.batch).value


def summary_of(found: Exported) -> str:
    """What was written, in lines."""
    manifest = found.manifest
    lines = [str(found.path)]
    if manifest.parity is not None:
        lines.append(f"outputs equal PyTorch's within a relative {manifest.parity:.1e}")
    lines.append(
        f"latency {found.measurement} at batch {manifest.target['batch']}" if found.measurement else "not run: no GPU here"
    )
    lines += [f"accuracy {manifest.accuracy:.2f} %"] if manifest.accuracy is not None else []
    return "\n".join([*lines, *found.commands])


__all__ = ["FORMATS", "Exportable", "Exported", "export_engine", "from_graph", "from_run", "load_engine", "summary_of"]
