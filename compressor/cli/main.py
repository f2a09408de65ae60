"""The command `compressor`: a thin shell over `compressor.api`."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import export, profile
from compressor.cli.compress import compress
from compressor.cli.options import Json, Model, Shapes, Weights, inputs_of
from compressor.version import __version__

# torch takes seconds to import, so commands import what they need; `--help` and wrong options answer at once.

app = typer.Typer(
    name="compressor",
    help="Compress convolutional networks to a measured latency. Start with `compressor demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(compress)
app.command()(profile.profile)
app.command()(profile.doctor)
app.command()(export.export)
app.command()(export.check_repository)


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
    from compressor.data.user_models import load_model
    from compressor.passes.channels.analyze import analyze
    from compressor.passes.tracing.trace import trace

    network = load_model(model, weights)
    channels = analyze(trace(network, inputs_of(shapes, network)), lossy=not exact)
    if graph is not None:
        from compressor.report.graph import draw
        from compressor.values.files import write_bytes

        write_bytes(graph, draw(channels).encode())
    print(json.dumps(inspection(channels), indent=1) if as_json else inspection_table(channels))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a small network on real digits, halve its measured latency, repair, export, check, report (3 minutes)."""
    from compressor.cli.console import ConsoleProgress, resumable
    from compressor.cli.demo import demo as run_demo

    with ConsoleProgress() as progress, resumable(out):
        result = run_demo(out, seed, progress)
    print(result.summary())
    print(f"\n{out / 'report.html'}")


def main() -> None:
    """Run the command; every expected failure is one message and an exit code, never a traceback."""
    from compressor.cli.console import fail, heed_interrupts

    heed_interrupts()
    logging.basicConfig(level=os.environ.get("COMPRESSOR_LOG", "ERROR").upper(), format="%(name)s: %(message)s")
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        fail("interrupted", 1)
    except Exception as error:
        _report(error)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> None:
    from compressor.cli.console import fail

    show = getattr(error, "show", None)
    if show is not None:  # the parser's own: wrong option, missing argument
        show()
        sys.exit(getattr(error, "exit_code", 2))
    code = getattr(error, "exit_code", None)
    if type(error).__name__ == "Abort":
        fail("interrupted", 1)
    if code is None and os.environ.get("COMPRESSOR_TRACEBACK"):
        raise error
    text = str(error) if code is not None else f"{type(error).__name__}: {error} (COMPRESSOR_TRACEBACK=1 shows where)"
    fail(text, 1 if code is None else code)
