"""Arguments and options of the commands, with their help, and what is read from their texts; those of `compress` in its order."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compressor.values.budget import Budget

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="package.module:callable or file.py:callable that returns the model; or an ONNX file."),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Weights file: .safetensors, or .pt of plain tensors.")]
Shapes = Annotated[
    list[str],
    typer.Option("--input", help="Input shape with batch, such as 1x3x224x224 or mask=1x1x640x640:uint8; once per input."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RunFolder = Annotated[Path, typer.Option("--out", help="Folder of the run; the same command there goes on where it stopped.")]
DataName = Annotated[
    str | None,
    typer.Option("--data", help="digits, cifar10:DIR, folder:DIR, or module:callable that returns (train, validate[, test])."),
]
ImagesFolder = Annotated[
    str | None,
    typer.Option("--images", help="A folder of images without labels, for compensation; suffices where nothing is trained."),
]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="classification, segmentation:classes=21, image-to-image, regression …, or module:callable."),
]
MetricName = Annotated[
    str | None, typer.Option("--metric", help="module:callable of (model, batches) that returns a number, instead of the task's.")
]
PartName = Annotated[
    str | None, typer.Option("--part", help="Submodule that is compressed, such as backbone, where the whole does not trace.")
]
Latency = Annotated[
    str | None, typer.Option(help="Measured latency: fraction of the original (0.5), absolute (2ms), or several: 0.8,0.65,0.5.")
]
Macs = Annotated[str | None, typer.Option(help="MACs: fraction (0.5) or absolute (60M).")]
Params = Annotated[str | None, typer.Option(help="Parameters: fraction (0.5) or absolute (400k).")]
Memory = Annotated[str | None, typer.Option(help="Weight memory: fraction (0.5) or absolute (1.5MB).")]
Drop = Annotated[
    float | None,
    typer.Option(
        min=0, help="Instead: the fastest network that loses at most so many points of accuracy (units of the metric), such as 1."
    ),
]
Front = Annotated[
    bool, typer.Option("--front", help="Instead: a network for every tenth of the original's latency, as far down as that goes.")
]
MethodName = Annotated[
    str | None, typer.Option(help="cap, cc, legr, aacp, factorize or magnitude; by default cap over branches and channels.")
]
Published = Annotated[
    bool, typer.Option("--published", help="Of cap, cc, legr and aacp: the settings of the released code, before any others.")
]
MethodSettings = Annotated[
    list[str] | None, typer.Option("--set", help="setting=value: any other setting of the method, such as fitness.steps=100.")
]
Criterion = Annotated[str | None, typer.Option(help="Of magnitude: l1, l2, taylor, batchnorm-scale, geometric-median or random.")]
Scope = Annotated[str | None, typer.Option(help="Of magnitude: global or uniform.")]
Floor = Annotated[
    float | None, typer.Option(help="Of cap: lowest share of right answers on the hold-out, such as 0.92; no budget is needed.")
]
Units = Annotated[str | None, typer.Option(help="Of cc as published: channels, ranks (of sequences of smaller layers), or both.")]
Form = Annotated[
    str | None, typer.Option(help="Of factorize: layers become svd, spatial_svd, tucker2, cp or tensor_train sequences.")
]
Ranks = Annotated[
    str | None, typer.Option(help="Of factorize: by energy, rate (of a layer's MACs) or vbmf; fixed with --set rank=8.")
]
Trials = Annotated[int | None, typer.Option(min=1, help="Of legr and aacp: candidates that are judged; 400.")]
Sampler = Annotated[
    str | None, typer.Option(help="Of legr and aacp: who proposes candidates: the method, or tpe, cmaes, nsgaii or random.")
]
Fitness = Annotated[
    str | None,
    typer.Option(help="Of legr and aacp: before a candidate is judged: none, train, recalibrate or compensate."),
]
Steps = Annotated[
    str | None,
    typer.Option(help="Of aacp and factorize: widths or ranks on the measured staircase, or all multiples of align."),
]
Space = Annotated[
    str | None,
    typer.Option(help="Of cap, cc, legr and aacp, what may go: channels, ranks, depth, or several joined by +."),
]
Parallel = Annotated[int | None, typer.Option(min=1, help="Of legr and aacp: candidates under way at once.")]
Storage = Annotated[
    str | None, typer.Option(help="URL of the study, such as sqlite:///study.db; processes that share it share the work.")
]
Cluster = Annotated[str | None, typer.Option(help="Ray cluster that judges candidates: auto, or ray://host:port.")]
Compensate = Annotated[bool, typer.Option("--compensate/--no-compensate", help="Repair the network in closed form after removal.")]
CalibrationImages = Annotated[int | None, typer.Option(min=8, help="At most this many images for statistics; 2000.")]
BackendName = Annotated[str, typer.Option(help="Where latency is measured.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size that is timed.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")]
Precision = Annotated[str, typer.Option(help="Of the engine: fp32, fp16, bf16 or int8, as the back end has them.")]
BackendOptions = Annotated[list[str] | None, typer.Option("--option", help="name=value of the back end, such as mode=compile.")]
Align = Annotated[int, typer.Option(min=1, help="Widths are multiples of this many channels.")]
Epochs = Annotated[int, typer.Option(help="Fine-tuning epochs; 0 for none.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
Distillation = Annotated[float, typer.Option(help="Share of the loss that follows the original's outputs.")]
MimicSteps = Annotated[
    int | None,
    typer.Option("--mimic", min=1, help="Train without labels instead, for so many steps: to give the original's features."),
]
TrainBatch = Annotated[int, typer.Option(min=1, help="Batch size of training and evaluation.")]
TrainImages = Annotated[int | None, typer.Option(min=2, help="At most this many training images.")]
Mean = Annotated[str | None, typer.Option(help="Normalisation of built-in data: means of values in 0..1, such as 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="Its standard deviations.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


def inputs_of(shapes: list[str], model: Any = None) -> tuple[Any, ...]:
    """Zeros of the given shapes; only shapes and types matter.

    Args:
        shapes: `[name=]sizes[:type]`.
        model: With names, what they are arguments of; they are put in its order.
    """
    import torch

    inputs: dict[str, Any] = {}
    for k, text in enumerate(shapes):
        name, _, rest = text.rpartition("=")
        sizes, _, kind = rest.partition(":")
        parts = sizes.lower().replace(",", "x").split("x")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise typer.BadParameter(f"{text!r}: write sizes joined by x, such as 1x3x224x224", param_hint="--input")
        dtype = getattr(torch, kind or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise typer.BadParameter(f"{text!r}: {kind!r} is no type; write float32, int64, uint8, bool …", param_hint="--input")
        inputs[name or str(k)] = torch.zeros([int(part) for part in parts], dtype=dtype)
    if len(inputs) < len(shapes):
        raise typer.BadParameter("an input is named twice", param_hint="--input")
    if not any("=" in text for text in shapes):
        return tuple(inputs.values())
    known = list(inspect.signature(model.forward).parameters) if model is not None else []
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise typer.BadParameter(f"the model has no input {unknown[0]!r}; its own are {', '.join(known)}", param_hint="--input")
    if sorted(map(known.index, inputs)) != list(range(len(inputs))):
        raise typer.BadParameter(f"the model's inputs are {', '.join(known)}: give the first of them", param_hint="--input")
    return tuple(inputs[name] for name in sorted(inputs, key=known.index))


def budget_of(needed: bool, drop: float | None = None, front: bool = False, **asked: str | None) -> "Budget | None":
    """The budget of `--latency` and the others; None where nothing is limited, and need not be: the method has a floor."""
    from compressor.values.budget import Budget

    bounds: dict[str, Any] = {name: _bound(text) for name, text in asked.items() if text}
    bounds |= {"drop": drop} if drop is not None else {}
    bounds |= {"front": "latency"} if front else {}
    return Budget(**bounds) if bounds or needed else None


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


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Of a list joined by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write numbers joined by commas", param_hint="--mean / --std") from error
