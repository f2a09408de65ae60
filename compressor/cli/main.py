"""The command `compressor`: a thin shell over `compressor.api`."""

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli import export, latency
from compressor.cli.inputs import inputs_of
from compressor.version import __version__

# torch takes seconds to import, so commands import what they need; `--help` and wrong options answer at once.

app = typer.Typer(
    name="compressor",
    help="Compress convolutional networks to a measured latency. Start with `compressor demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(latency.profile)
app.command()(latency.doctor)
app.command()(export.export)
app.command()(export.check_repository)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="package.module:callable or file.py:callable; called without arguments, it returns the model."
    ),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Weights file: .safetensors, or .pt of plain tensors.")]
Shapes = Annotated[list[str], typer.Option("--input", help="Input shape with batch, such as 1x3x224x224; once per input.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def version() -> None:
    """Print versions of this package and of what results depend on."""
    from compressor.runs.folder import versions

    for name, value in {"compressor": __version__, **versions()}.items():
        print(f"{name} {value}")


@app.command()
def inspect(
    model: Model,
    shapes: Shapes,
    weights: Weights = None,
    as_json: Json = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Freeze channels that a layer norm or the like computes statistics over.")
    ] = False,
    graph: Annotated[
        Path | None, typer.Option("--graph", help="Draw the network, its groups as colours, to this SVG file.")
    ] = None,
) -> None:
    """Show channel groups, what is tied to what and what is frozen and why, per layer what may be removed, MACs and parameters.

    Example: compressor inspect torchvision.models:resnet18 --input 1x3x224x224
    """
    from compressor.cli.inspection import inspection, inspection_table
    from compressor.data.loading import load_model
    from compressor.passes.channels.analyze import analyze
    from compressor.passes.tracing.trace import trace

    channels = analyze(trace(load_model(model, weights), inputs_of(shapes)), lossy=not exact)
    if graph is not None:
        from compressor.report.graph import draw
        from compressor.values.files import write_bytes

        write_bytes(graph, draw(channels).encode())
    print(json.dumps(inspection(channels), indent=1) if as_json else inspection_table(channels))


@app.command()
def compress(
    model: Model,
    shapes: Shapes,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; the same command there goes on where it stopped.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help="digits, cifar10:DIR, folder:DIR, or module:callable that returns (train, validate[, test])."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", help="A folder of images without labels, for compensation; suffices where nothing is trained."),
    ] = None,
    weights: Weights = None,
    latency: Annotated[
        str | None, typer.Option(help="Measured latency: fraction of the original (0.5), absolute (2ms), or several: 0.8,0.65,0.5.")
    ] = None,
    macs: Annotated[str | None, typer.Option(help="MACs: fraction (0.5) or absolute (60M).")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters: fraction (0.5) or absolute (400k).")] = None,
    memory: Annotated[str | None, typer.Option(help="Weight memory: fraction (0.5) or absolute (1.5MB).")] = None,
    method: Annotated[str, typer.Option(help="magnitude, cap, cc, factorize, legr or aacp.")] = "magnitude",
    published: Annotated[
        bool, typer.Option("--published", help="Of cap, cc, legr and aacp: the settings of the released code, before any others.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="setting=value: any other setting of the method, such as fitness.steps=100.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="Of magnitude: l1, l2, taylor, batchnorm-scale, geometric-median or random.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="Of magnitude: global or uniform.")] = None,
    floor: Annotated[
        float | None, typer.Option(help="Of cap: lowest share of right answers on the hold-out, such as 0.92; no budget is needed.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="Of cc: channels, ranks (layers become sequences of smaller ones), or both.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="Of factorize: layers become svd, spatial_svd, tucker2, cp or tensor_train sequences.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Of factorize: by energy, rate (of a layer's MACs) or vbmf; fixed with --set rank=8.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Of legr and aacp: candidates that are judged; 400.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Of legr and aacp: who proposes candidates: the method, or tpe, cmaes, nsgaii or random.")
    ] = None,
    fitness: Annotated[
        str | None,
        typer.Option(help="Of legr and aacp: before a candidate is judged: none, train, recalibrate or compensate."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Of aacp and factorize: widths or ranks on the measured staircase, or all multiples of align."),
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Of cap, legr and aacp: channels, or channels+ranks; of cap also ranks.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Of legr and aacp: candidates under way at once.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of the study, such as sqlite:///study.db; processes that share it share the work.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Ray cluster that judges candidates: auto, or ray://host:port.")] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate/--no-compensate", help="Repair the network in closed form after removal.")
    ] = True,
    calibration_images: Annotated[int | None, typer.Option(min=8, help="At most this many images for statistics; 2000.")] = None,
    backend: Annotated[str, typer.Option(help="Where latency is measured.")] = "onnxruntime",
    batch: Annotated[int, typer.Option(min=1, help="Batch size that is timed.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")] = 1,
    precision: Annotated[str, typer.Option(help="Of the engine: fp32, fp16, bf16 or int8, as the back end has them.")] = "fp32",
    option: Annotated[list[str] | None, typer.Option("--option", help="name=value of the back end, such as mode=compile.")] = None,
    align: Annotated[int, typer.Option(min=1, help="Widths are multiples of this many channels.")] = 8,
    epochs: Annotated[int, typer.Option(help="Fine-tuning epochs; 0 for none.")] = 5,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.01,
    distillation: Annotated[float, typer.Option(help="Share of the loss that follows the original's outputs.")] = 0.5,
    label_smoothing: Annotated[float, typer.Option(help="Of the cross-entropy.")] = 0.0,
    train_batch: Annotated[int, typer.Option(min=1, help="Batch size of training and evaluation.")] = 128,
    train_images: Annotated[int | None, typer.Option(min=2, help="At most this many training images.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Normalisation of built-in data: means of values in 0..1, such as 0.5,0.5,0.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Its standard deviations.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Compress a trained classifier to a budget, repair it, export and measure it, and write a report.

    Example: compressor compress net.py:resnet56 --weights resnet56.safetensors --input 1x3x32x32
    --data cifar10:data --latency 0.5 --out runs/half
    """
    from compressor import api
    from compressor.cli.console import ConsoleProgress
    from compressor.cli.method_options import method_of
    from compressor.data.images import load_data, load_images
    from compressor.data.loading import load_model
    from compressor.errors import BackendError
    from compressor.methods import METHODS
    from compressor.runtime.backends import BACKENDS
    from compressor.training.fine_tune import FineTune
    from compressor.values.budget import Budget
    from compressor.values.target import Target, option_of

    if method not in METHODS:
        raise typer.BadParameter(f"{method!r}: known methods are {', '.join(METHODS)}", param_hint="--method")
    if backend not in BACKENDS:
        raise typer.BadParameter(f"{backend!r}: known back ends are {', '.join(sorted(BACKENDS))}", param_hint="--backend")
    if data is None and images is None:
        raise typer.BadParameter("give data with labels (--data), or images without (--images)", param_hint="--data / --images")
    bounds = {k: _bound(v) for k, v in (("latency", latency), ("macs", macs), ("params", params), ("memory", memory)) if v}
    budget = Budget(**bounds) if bounds or floor is None else None
    try:
        options = dict(option_of(text, BACKENDS[backend]().options) for text in option or [])
        target = Target(backend, batch, threads, align, precision, options)
    except BackendError as error:
        raise typer.BadParameter(str(error), param_hint="--precision / --option") from error
    own = {
        "criterion": criterion, "scope": scope, "floor": floor, "units": units, "form": form, "ranks": ranks, "trials": trials,
        "sampler": sampler, "fitness": fitness, "steps": steps, "space": space, "parallel": parallel,
    }  # fmt: skip
    chosen = method_of(method, own, settings or (), published, calibration_images)
    if not compensate:
        chosen = replace(chosen, compensation=None)
    finetune = FineTune(epochs=epochs, learning_rate=lr, distillation=distillation, label_smoothing=label_smoothing)
    inputs = inputs_of(shapes)
    network = load_model(model, weights)
    normal = (_numbers(mean), _numbers(std))
    found = load_data(data, train_batch, train_images, *normal) if data is not None else None
    labelled: dict[str, Any] = {"train": found.train, "validate": found.validate, "test": found.test} if found else {}
    labelled["calibrate"] = found.plain if found else None
    if images is not None:
        labelled["calibrate"] = load_images(images, train_batch, *normal, calibration_images or 2000)
    with ConsoleProgress() as progress, _resumable(out):
        result = api.compress(
            network, inputs, **labelled, budget=budget, target=target, method=chosen, finetune=finetune, out=out, seed=seed,
            progress=progress, storage=storage, cluster=cluster,
        )  # fmt: skip
    print(result.summary())
    print(f"\n{out / 'report.html'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a small network on real digits, halve its measured latency, repair, export, check, report (3 minutes)."""
    from compressor.cli.console import ConsoleProgress
    from compressor.cli.demo import demo as run_demo

    with ConsoleProgress() as progress, _resumable(out):
        result = run_demo(out, seed, progress)
    print(result.summary())
    print(f"\n{out / 'report.html'}")


def main() -> None:
    """Run the command; every expected failure is one message and an exit code, never a traceback."""
    from compressor.cli.console import heed_interrupts

    heed_interrupts()
    logging.basicConfig(level=os.environ.get("COMPRESSOR_LOG", "ERROR").upper(), format="%(name)s: %(message)s")
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except Exception as error:
        _report(error)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> None:
    show = getattr(error, "show", None)
    if show is not None:  # the parser's own: wrong option, missing argument
        show()
        sys.exit(getattr(error, "exit_code", 2))
    code = getattr(error, "exit_code", None)
    if type(error).__name__ == "Abort":
        _fail("interrupted", 1)
    if code is None and os.environ.get("COMPRESSOR_TRACEBACK"):
        raise error
    text = str(error) if code is not None else f"{type(error).__name__}: {error} (COMPRESSOR_TRACEBACK=1 shows where)"
    _fail(text, 1 if code is None else code)


def _fail(message: str, code: int) -> None:
    print(f"compressor: {message}", file=sys.stderr)
    sys.exit(code)


class _resumable:  # noqa: N801 - reads as a statement
    """Says on ctrl-C where the state is."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Translate an interrupt."""
        if kind is KeyboardInterrupt:
            _fail(f"interrupted; what is finished is kept in {self._out}, the same command goes on from there", 1)


def _bound(text: str) -> float | str | list[float | str]:
    """A plain number is a fraction; anything else is absolute and carries a unit; several are joined by commas."""
    if "," in text:
        return [_one_bound(part.strip()) for part in text.split(",") if part.strip()]
    return _one_bound(text)


def _one_bound(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write numbers joined by commas", param_hint="--mean / --std") from error
