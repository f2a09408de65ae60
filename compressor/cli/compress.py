"""The command `compress`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from compressor.cli.options import (
    Align,
    BackendName,
    BackendOptions,
    Batch,
    CalibrationImages,
    Cluster,
    Compensate,
    Criterion,
    DataName,
    Distillation,
    Drop,
    Epochs,
    Fitness,
    Floor,
    Form,
    Front,
    ImagesFolder,
    Latency,
    LearningRate,
    Macs,
    Mean,
    Memory,
    MethodName,
    MethodSettings,
    MetricName,
    MimicSteps,
    Model,
    Parallel,
    Params,
    PartName,
    Precision,
    Published,
    Ranks,
    RunFolder,
    Sampler,
    Scope,
    Seed,
    Shapes,
    Space,
    Std,
    Steps,
    Storage,
    TaskName,
    Threads,
    TrainBatch,
    TrainImages,
    Trials,
    Units,
    Weights,
    budget_of,
    inputs_of,
    numbers,
)

if TYPE_CHECKING:
    from compressor.values.target import Target


# fmt: off
def compress(
    model: Model, shapes: Shapes, out: RunFolder, data: DataName = None, images: ImagesFolder = None, weights: Weights = None,
    task: TaskName = None, metric: MetricName = None, part: PartName = None,
    latency: Latency = None, macs: Macs = None, params: Params = None, memory: Memory = None, drop: Drop = None,
    front: Front = False, method: MethodName = None,
    published: Published = False, settings: MethodSettings = None, criterion: Criterion = None, scope: Scope = None,
    floor: Floor = None, units: Units = None, form: Form = None, ranks: Ranks = None, trials: Trials = None,
    sampler: Sampler = None, fitness: Fitness = None, steps: Steps = None, space: Space = None, parallel: Parallel = None,
    storage: Storage = None, cluster: Cluster = None, compensate: Compensate = True,
    calibration_images: CalibrationImages = None, backend: BackendName = "onnxruntime", batch: Batch = 1, threads: Threads = 1,
    precision: Precision = "fp32", option: BackendOptions = None, align: Align = 8, epochs: Epochs = 5, lr: LearningRate = 0.01,
    distillation: Distillation = 0.5, train_batch: TrainBatch = 128,
    train_images: TrainImages = None, mimic: MimicSteps = None, mean: Mean = None, std: Std = None, seed: Seed = 0,
) -> None:
    """Compress a trained network to a budget, repair it, export and measure it, and write a report.

    Example: compressor compress net.py:resnet56 --weights resnet56.safetensors --input 1x3x32x32
    --data cifar10:data --latency 0.5 --out runs/half
    """
    # fmt: on
    from compressor import api
    from compressor.cli.console import ConsoleProgress, resumable
    from compressor.cli.method_options import method_of
    from compressor.cli.task_options import task_of
    from compressor.data.user_models import load_model
    from compressor.methods import METHODS, default_method
    from compressor.training.fine_tune import FineTune
    from compressor.training.mimic import Mimic

    if method is not None and method not in METHODS:
        raise typer.BadParameter(f"{method!r}: known methods are {', '.join(METHODS)}", param_hint="--method")
    where = _target(backend, batch, threads, align, precision, option or [])
    if data is None and images is None:
        raise typer.BadParameter("give data with labels (--data), or images without (--images)", param_hint="--data / --images")
    budget = budget_of(floor is None, drop, front, latency=latency, macs=macs, params=params, memory=memory)
    own = {
        "criterion": criterion, "scope": scope, "floor": floor, "units": units, "form": form, "ranks": ranks, "trials": trials,
        "sampler": sampler, "fitness": fitness, "steps": steps, "space": space, "parallel": parallel,
    }  # fmt: skip
    chosen = None
    if method or published or settings or calibration_images or not compensate or any(value is not None for value in own.values()):
        named = method or default_method(budget, images=True)
        chosen = method_of(named, own, settings or (), published, calibration_images)
        chosen = chosen if compensate else replace(chosen, compensation=None)
    finetune: FineTune | Mimic = FineTune(epochs, lr, distillation=distillation)
    finetune = Mimic(steps=mimic) if mimic else finetune
    meaning, network = task_of(task, metric), load_model(model, weights)
    inputs = inputs_of(shapes, network)
    normal = (numbers(mean), numbers(std))
    given = _data(data, images, train_batch, train_images, calibration_images, normal)
    with ConsoleProgress() as progress, resumable(out):
        result = api.compress(
            network, inputs, **given, budget=budget, target=where, method=chosen, finetune=finetune, out=out, seed=seed,
            progress=progress, storage=storage, cluster=cluster, task=meaning, part=part,
        )  # fmt: skip
    print(result.summary())
    print(f"\n{out / 'report.html'}")


def _target(backend: str, batch: int, threads: int, align: int, precision: str, options: list[str]) -> "Target":
    from compressor.errors import BackendError
    from compressor.runtime.backends import BACKENDS
    from compressor.values.target import Target, option_of

    if backend not in BACKENDS:
        raise typer.BadParameter(f"{backend!r}: known back ends are {', '.join(sorted(BACKENDS))}", param_hint="--backend")
    try:
        known = dict(option_of(text, BACKENDS[backend]().options) for text in options)
        return Target(backend, batch, threads, align, precision, known)
    except BackendError as error:
        raise typer.BadParameter(str(error), param_hint="--precision / --option") from error


def _data(
    name: str | None, images: str | None, batch: int, most: int | None, calibration: int | None, normal: tuple[Any, Any]
) -> dict[str, Any]:
    """Batches as `api.compress` takes them."""
    from compressor.data.images import load_data, load_images

    found = load_data(name, batch, most, *normal) if name is not None else None
    given: dict[str, Any] = {"train": found.train, "validate": found.validate, "test": found.test} if found else {}
    given["calibrate"] = found.plain if found else None
    if images is not None:
        given["calibrate"] = load_images(images, batch, *normal, calibration or 2000)
    return given
