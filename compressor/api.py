"""The verbs: trace, analyze, apply, compress, finish, export, load, profile."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, fx, nn

from compressor.errors import PlanError
from compressor.methods import Method
from compressor.passes.channels.analyze import analysis_of, analyze
from compressor.passes.tracing.trace import is_traced, trace
from compressor.passes.transforms.apply_plan import applied
from compressor.passes.transforms.narrow_module import narrow_module
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.passes.transforms.verify import verify_removal
from compressor.pipeline.compression import Compression
from compressor.pipeline.finishing import finish as finished
from compressor.pipeline.loading import network_of_run, rebuilt
from compressor.runs.result import Result
from compressor.runtime.measuring.measure import export_checked, measure
from compressor.tasks.samples import Batches
from compressor.tasks.task import Task
from compressor.training.by_function import Recovery
from compressor.training.fine_tune import FineTune
from compressor.values.budget import Budget
from compressor.values.measurement import Measurement
from compressor.values.plan import Plan
from compressor.values.progress import Progress
from compressor.values.target import Target

__all__ = ["analyze", "apply", "compress", "export", "finish", "load", "profile", "trace"]


def apply(
    plan: Plan,
    graph: nn.Module,
    example_inputs: Sequence[Tensor] | None = None,
    verify: bool = False,
) -> nn.Module:
    """Apply a plan.

    Args:
        plan: What stays.
        graph: A traced graph: a new graph is returned and this one is left alone. Or the original model:
            it is narrowed *in place* and returned, which works wherever no constant in its `forward`
            would need editing; a block whose branch goes is replaced by what is left of it.
        example_inputs: Needed for an original model, as for `trace`.
        verify: Check on random inputs that the network without the channels gives what the whole one gives with them set to
            zero, as `compress` does; two to four more forward passes.

    Raises:
        PlanError: The plan does not fit; or the model's `forward` holds sizes of its own (they are named).
        PassError: The check fails.
    """
    if is_traced(graph):
        channels = analysis_of(cast(fx.GraphModule, graph))
        if verify:
            verify_removal(channels, plan, RemoveChannels(plan, channels)(channels.graph).graph)
        return applied(plan, channels)
    if plan.factors:
        raise PlanError(
            f"the plan factorizes {len(plan.factors)} layers, which makes a new graph: pass compressor.trace(model, inputs)"
        )
    if example_inputs is None:
        raise PlanError(
            "this is no traced graph: pass compressor.trace(model, inputs), or example_inputs to narrow the model in place"
        )
    traced = trace(graph, example_inputs)
    if verify:
        apply(plan, traced, verify=True)
    return narrow_module(plan, graph, traced)


def compress(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    validate: Batches | None = None,
    budget: Budget | None = None,
    out: str | Path,
    train: Batches | None = None,
    calibrate: Iterable[object] | None = None,
    test: Batches | None = None,
    target: Target | None = None,
    method: Method | None = None,
    task: Task | None = None,
    part: str | None = None,
    finetune: Recovery | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    storage: str | None = None,
    cluster: str | None = None,
) -> Result:
    """Compress a trained network to a budget: remove, compensate, fine-tune, export, check, measure, report.

    Killed at any moment, the same call goes on from what is finished.

    Args:
        model: The trained model; it is left as it was.
        example_inputs: As for `trace`.
        validate: Batches that decisions and the reported metric rest on; a hold-out of the training data. `(inputs, labels)` for a
            classifier, else what the task reads. Left out, a fifth of the images of `calibrate` takes its place, and what the
            original says of them that of the labels: the metric is then the agreement with the original.
        budget: What the result may cost; may be left out where the method has a floor (`CaP(floor=0.92)`). A bound that is a
            list asks for a family: one network per value, in `Result.members`, from one search where the method can (`LeGR`).
        out: The run's folder.
        train: Batches for fine-tuning; without them there is none.
        calibrate: Images for statistics, or batches that begin with them; the training data by default. Those may be augmented,
            these should look like what the network will see.
        test: Batches that are looked at only once, at the end, for the number to be published.
        target: Where it is to be fast; ONNX Runtime on one CPU thread, batch 1, by default.
        method: How to decide. By default branches and channels go where that loses least after repair (`CaP` over
            `channels+depth`, without a limit of latency over `channels+ranks+depth`); without images, and for networks
            whose layers are such that this cannot meet the budget, `Magnitude()`.
        task: What the network is for: its loss, its metric, and where in a batch its inputs are; `compressor.tasks` has ready
            ones. A classifier by default.
        part: Name of a submodule, such as `backbone`: that is traced, compressed, measured and returned, and the task judges the
            whole model with it in its place (`model.set_submodule(part, result.graph)`).
        finetune: Settings of the fine-tuning; or `Mimic()`, which needs no labels: the result is trained to give the original's
            features on the images of `calibrate`; or a function `finetune(model, context)` that trains the network in place by
            whatever means (`compressor.Context` says what it is given).
        seed: Of everything random.
        progress: Where to say what is being done.
        storage: Of trials, a URL that Optuna knows; `study.db` in the folder by default. Processes that share it share the work.
        cluster: Ray cluster that candidates are judged on: `auto` or `ray://host:port`; this process by default.

    Raises:
        TraceError: The model cannot be traced.
        BudgetError: The budget cannot be met; the closest that can is said.
        DataError: Data or folder are not usable.
        BackendError: An engine cannot be built, or does not agree with PyTorch.
    """
    return Compression(
        model, example_inputs, train=train, validate=validate, test=test, calibrate=calibrate, budget=budget,
        target=target or Target(), method=method, finetune=finetune or FineTune(), out=Path(out), seed=seed,
        progress=progress or Progress(), storage=storage, cluster=cluster, task=task, part=part,
    ).run()  # fmt: skip


def finish(
    run: str | Path,
    trained: nn.Module,
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    validate: Batches | None = None,
    calibrate: Iterable[object] | None = None,
    test: Batches | None = None,
    task: Task | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Take a run's network back after training by other means: check, judge, export, measure and report it.

    `compress(…, finetune=FineTune(epochs=0))` leaves a graph that trains like any module (`result.graph`, or
    `compressor.load(run)` in another process). What comes of it goes into the folder `finished` of the run.

    Args:
        run: The run's folder.
        trained: That graph, trained; what DistributedDataParallel, `torch.compile` or an average of weights put around it is
            taken off.
        model: The original, as `compress` was given it.
        example_inputs: As for `compress`.
        validate: As for `compress`.
        calibrate: As for `compress`, where there are no labels.
        test: As for `compress`.
        task: As for `compress`.
        seed: Of everything random.
        progress: Where to say what is being done.

    Raises:
        DataError: There is no such run, or the network is another.
        BackendError: An engine cannot be built, or does not agree with PyTorch.
    """
    return finished(
        Path(run), trained, model, example_inputs, validate, calibrate, test, task, seed, progress or Progress()
    )  # fmt: skip


def export(graph: fx.GraphModule, path: str | Path) -> Path:
    """Write a traced graph as ONNX, after checking that ONNX Runtime gives PyTorch's outputs.

    Args:
        graph: A traced graph.
        path: The file; after an error it is as it was.

    Raises:
        BackendError: The exporter refuses the graph, or the outputs differ.
        DataError: The file cannot be written.
    """
    export_checked(graph, Path(path))
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None) -> fx.GraphModule:
    """Load what a run left: a traced graph that can be run, trained and compressed further. No file of it runs code.

    Args:
        path: A run's folder, or a member of its front.
        model: The original architecture (weights do not matter). With it the network is rebuilt from plan
            and weights; without it the network file is read.

    Raises:
        DataError: There is no finished run, or a file was changed since it was written.
        PlanError: The plan does not fit `model`.
    """
    return network_of_run(Path(path)) if model is None else rebuilt(Path(path), model)


def profile(graph: fx.GraphModule, target: Target | None = None, seed: int = 0) -> Measurement:
    """Measured latency of a traced graph's whole engine on a target.

    Raises:
        BackendError: The engine cannot be built, or its outputs differ from PyTorch's.
    """
    return measure({"graph": graph}, target or Target(), seed)["graph"]
