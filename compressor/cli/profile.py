"""The commands about latency: `profile` and `doctor`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compressor.pipeline.profiling import Network
    from compressor.runtime.latency_model.staircase import Staircase
    from compressor.values.progress import Progress
    from compressor.values.target import Target

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|ONNX|ENGINE",
        help="package.module:callable, file.py:callable, a .onnx file, or a TensorRT .plan or .engine file.",
    ),
]


def profile(
    source: Source,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", "--input", help="Input shape with batch, such as 1x3x224x224; once per input.")
    ] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Weights of a model.")] = None,
    target: Annotated[str, typer.Option("--target", help="Back end; `compressor doctor` lists them.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8; several joined by commas.")] = "fp32",
    batch: Annotated[str, typer.Option(help="Batch sizes, joined by commas.")] = "1",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    option: Annotated[list[str] | None, typer.Option("--option", help="name=value of the back end, such as mode=compile.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="As for `compress`: calibrates INT8, measures accuracy.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Time every layer, too.")] = False,
    staircase: Annotated[str | None, typer.Option(help="Group whose widths are measured one by one, or `all`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for JSON, raw samples, NVIDIA's files and the page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Of inputs and order.")] = 0,
) -> None:
    """Measure the latency of a network on a back end: build, compare the outputs, time, and say how sure the numbers are.

    Example: compressor profile torchvision.models:resnet18 --shape 1x3x224x224 --precision fp32,int8 --batch 1,8
    --layers --out profile
    """
    from compressor.cli.console import ConsoleProgress
    from compressor.data.images import load_data
    from compressor.pipeline.profile_files import profile_records, write_profile
    from compressor.pipeline.profiling import profile_network
    from compressor.report.profile_table import profile_table
    from compressor.runtime.measuring.store import MeasurementStore

    targets = _targets(target, precision, batch, threads, option or [])
    batches = load_data(data).validate if data is not None else None
    with ConsoleProgress() as progress:
        progress.stage(f"{source} on {target}")
        network = _network(source, weights, shapes or [], target)
        found = profile_network(
            network, targets, data=batches, layers=layers, seed=seed, store=MeasurementStore(), progress=progress
        )
        stairs = _staircases(network, targets[0], staircase, progress) if staircase else []
    records = profile_records(found, stairs, source, " ".join(["compressor", *sys.argv[1:]]))
    print(json.dumps(records, indent=1) if as_json else profile_table(found, stairs))
    if out is not None:
        write_profile(out, source, found, stairs, records)
        print(f"\n{out / 'profile.html'}", file=sys.stderr if as_json else sys.stdout)
    if all(p.measurement is None for p in found):
        raise typer.Exit(1)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Try every back end on this machine: whether it works, and if not what to install or do."""
    from compressor.runtime.backends import BACKENDS

    found = {name: make().check() for name, make in BACKENDS.items()}
    if as_json:
        print(json.dumps({n: {"works": h.works, "detail": h.detail, "remedy": h.remedy} for n, h in found.items()}, indent=1))
        return
    for name, health in found.items():
        print(f"{name:17s} {'works' if health.works else 'no   '}  {health.detail}")
        if not health.works:
            print(f"{'':17s}        {health.remedy}")


def _targets(name: str, precisions: str, batches: str, threads: int, options: list[str]) -> "list[Target]":
    from compressor.errors import BackendError
    from compressor.runtime.backends import BACKENDS
    from compressor.values.target import Target, option_of

    if name not in BACKENDS:
        raise typer.BadParameter(f"{name!r}: known back ends are {', '.join(sorted(BACKENDS))}", param_hint="--target")
    sizes = [part.strip() for part in batches.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in sizes):
        raise typer.BadParameter(f"{batches!r}: write positive numbers joined by commas", param_hint="--batch")
    kinds = [part.strip() for part in precisions.split(",")]
    try:
        settings = dict(option_of(text, BACKENDS[name]().options) for text in options)
        return [Target(name, int(size), threads, precision=kind, options=settings) for kind in kinds for size in sizes]
    except BackendError as error:  # a precision or option that the back end does not have
        raise typer.BadParameter(str(error), param_hint="--precision / --option") from error


def _network(source: str, weights: Path | None, shapes: list[str], target: str) -> "Network":
    from compressor import api
    from compressor.cli.options import inputs_of
    from compressor.data.user_models import load_model
    from compressor.errors import DataError
    from compressor.pipeline.profiling import ENGINE_SUFFIXES, Network
    from compressor.runtime.onnx.read import load_onnx

    path = Path(source)
    if path.suffix == ".onnx":
        return Network(path.name, model=load_onnx(path), shapes=tuple(tuple(x.shape) for x in inputs_of(shapes)))
    if path.suffix in ENGINE_SUFFIXES:
        if not path.is_file():
            raise DataError(f"no such file: {path}")
        if not target.startswith("tensorrt"):
            raise DataError(f"{path.name} is an engine of TensorRT; use --target tensorrt or tensorrt-rtx")
        return Network(path.name, engine=path)
    if not shapes:
        raise DataError(f"{source} is a model: give its --shape, such as 1x3x224x224")
    model = load_model(source, weights)
    return Network(source, graph=api.trace(model, inputs_of(shapes, model)).eval())


def _staircases(network: "Network", target: "Target", which: str, progress: "Progress") -> "list[Staircase]":
    from compressor.errors import BackendError, DataError
    from compressor.passes.channels.analyze import analyze
    from compressor.runtime.latency_model.staircase import measure_staircase

    if network.graph is None:
        raise DataError("staircases need a model: the channels of an ONNX or engine file are not analysed")
    channels = analyze(network.graph)
    chosen = channels.free if which == "all" else [g for g in channels.free if which in (g.name, *g.layers)]
    if not chosen:
        known = ", ".join(g.name for g in channels.free[:8])
        raise DataError(f"no free group makes the channels of {which!r}; there are {known} … (compressor inspect)")
    found = []
    for group in chosen:
        progress.stage(f"staircase of {group.name}")
        try:
            found.append(measure_staircase(channels, group, target, progress=progress))
        except BackendError as error:
            if which != "all":
                raise
            progress.stage(str(error))
    return found
