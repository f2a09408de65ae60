"""The commands about engines: `export` and `check-repository`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import fx

    from compressor.pipeline.exporting import Exportable

FORMAT_HELP = "onnx, onnx-fp16, onnx-int8, tensorrt, or triton (a model repository)."


def export(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model as for `inspect`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the engine and its manifest; or a file, for onnx.")],
    shapes: Annotated[list[str] | None, typer.Option("--input", "--shape", help="Input shape, for a MODEL.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Weights file: .safetensors, or .pt of plain tensors.")] = None,
    form: Annotated[str, typer.Option("--format", help=FORMAT_HELP)] = "onnx",
    name: Annotated[str | None, typer.Option(help="Name of the engine or served model.")] = None,
    target: Annotated[str, typer.Option("--target", help="onnxruntime, tensorrt or tensorrt-rtx.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8, for tensorrt and triton.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Batch size that is measured, and that TensorRT optimizes for.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch of a TensorRT engine, or that the server forms.")] = 8,
    delay: Annotated[int, typer.Option(min=0, help="Microseconds a request may wait for others.")] = 500,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model on the server.")] = 1,
    data: Annotated[str | None, typer.Option("--data", help="As for `compress`: calibrates INT8, measures accuracy.")] = None,
) -> None:
    """Write an engine for a server: compared with PyTorch, measured, with a manifest beside it.

    Example: compressor export runs/half --format triton --out repository --max-batch 16
    """
    from compressor.cli.console import ConsoleProgress
    from compressor.data.images import load_data
    from compressor.pipeline.exporting import FORMATS, export_engine, from_run, summary_of
    from compressor.runtime.backends import BACKENDS
    from compressor.runtime.engines.triton import Serving
    from compressor.values.target import Target

    if form not in FORMATS:
        raise typer.BadParameter(f"{form!r}: known formats are {', '.join(FORMATS)}", param_hint="--format")
    if target not in BACKENDS:
        raise typer.BadParameter(f"{target!r}: known back ends are {', '.join(sorted(BACKENDS))}", param_hint="--target")
    if out.suffix == ".onnx":
        _file(source, out, shapes, weights, form)
        return
    batches = load_data(data).validate if data is not None else None
    options = {"max_batch": max_batch} if target.startswith("tensorrt") else {}
    with ConsoleProgress() as progress:
        found = from_run(Path(source)) if Path(source).is_dir() else _of_model(source, shapes, weights)
        serving = Serving(max_batch if found.dynamic else 0, delay_us=delay, instances=instances)
        wanted = Target(target, batch, precision=precision, options=options)
        again = shlex.join(["compressor", *sys.argv[1:]])
        made = export_engine(
            found, form, out, target=wanted, name=name, data=batches, serving=serving, rebuild=again, progress=progress
        )
    print(summary_of(made))


def check_repository(
    repository: Annotated[Path, typer.Argument(help="A Triton model repository that `export` wrote.")],
) -> None:
    """Check a model repository for what Triton finds only when it loads a model or a request comes."""
    from compressor.errors import BackendError
    from compressor.runtime.engines.triton import validate_repository

    found = validate_repository(repository)
    for model, problems in found.items():
        print(f"{model}: {'; '.join(problems) or 'servable'}")
    if any(found.values()):
        raise BackendError(f"{sum(map(bool, found.values()))} of {len(found)} models would not be served")


def _file(source: str, out: Path, shapes: list[str] | None, weights: Path | None, form: str) -> None:
    """A plain ONNX file, without a manifest."""
    from compressor import api
    from compressor.pipeline.loading import check_run, onnx_of_run
    from compressor.values.files import write_bytes

    if form != "onnx":
        raise typer.BadParameter(f"{form} is written with a manifest, into a folder; {out} names a file", param_hint="--out")
    if Path(source).is_dir():
        error = check_run(Path(source))
        write_bytes(out, onnx_of_run(Path(source)))
        print(f"{out}: ONNX Runtime = PyTorch within a relative {error:.1e}")
        return
    print(f"{api.export(_graph(source, shapes, weights), out)}: checked against PyTorch")


def _graph(source: str, shapes: list[str] | None, weights: Path | None) -> "fx.GraphModule":
    from compressor import api
    from compressor.cli.options import inputs_of
    from compressor.data.user_models import load_model
    from compressor.errors import DataError

    if not shapes:
        raise DataError(f"{source} is no folder of a run; for a model, give --input")
    network = load_model(source, weights)
    return api.trace(network, inputs_of(shapes, network)).eval()


def _of_model(source: str, shapes: list[str] | None, weights: Path | None) -> "Exportable":
    from compressor.pipeline.exporting import from_graph

    return from_graph(_graph(source, shapes, weights), source.rpartition(":")[2])
