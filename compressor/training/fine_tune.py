"""Fine-tuning: the task's loss, optional distillation from the original, cosine schedule, resumable."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

from compressor.data.seeding import seeded
from compressor.errors import DataError
from compressor.passes.statistics.distances import ClassDivergence, Distance, mean_of
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import device_of
from compressor.tasks.samples import Batches, Sample, samples_of
from compressor.tasks.task import NotFiniteError
from compressor.values.files import check_finite, load_tensors, save_tensors
from compressor.values.loaders import batch_count
from compressor.values.progress import Progress
from compressor.values.settings import check


@dataclass(frozen=True)
class FineTune:
    """Settings of a fine-tuning run.

    Attributes:
        epochs: Passes over the training data; 0 for none.
        learning_rate: At its peak; SGD with Nesterov momentum, one tenth of an epoch of warm-up, cosine to zero.
        momentum: Of SGD.
        weight_decay: Of weights with two or more axes; biases and norms have none.
        distillation: Share of the loss that is how far the outputs are from the original's, as the task compares them, 0 to 1.
        temperature: Softens class probabilities that are compared (Hinton et al., 2015).

    Raises:
        DataError: A setting is out of range.
    """

    epochs: int = 5
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distillation: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, DataError, {
            "epochs": (0, math.inf), "learning_rate": (0, math.inf), "momentum": (0, 1), "weight_decay": (0, math.inf),
            "distillation": (0, 1), "temperature": (1e-6, math.inf),
        })  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return asdict(self)


def train(
    model: nn.Module,
    batches: Batches,
    settings: FineTune,
    teacher: fx.GraphModule | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train `model` in place.

    Args:
        model: The network. Parameters that ask for no gradient stay as they are; where none asks, all are trained.
        batches: `Samples`, or pairs `(inputs, labels)` of a classifier; iterated once per epoch. The global generators and the
            loader's own are seeded before every epoch, so that a shuffling loader gives the same order again after a restart.
        settings: The settings.
        teacher: The original, for distillation; ignored where its share is 0.
        checkpoint: Written after every epoch; if it is there already, training goes on from it.
        seed: Of the epochs' order and of dropout.
        progress: Where to say the loss.

    Raises:
        DataError: There is no data, the loss is not finite, or the checkpoint is of another network.
    """
    if settings.epochs == 0:
        return
    optimizer = _optimizer(model, settings)
    first = _resume(model, optimizer, checkpoint, settings)
    total = batch_count(batches)
    modes = {module: module.training for module in model.modules()}
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    try:
        for epoch in range(first, settings.epochs):
            with seeded(seed * 100_003 + epoch, batches, devices=devices), torch.enable_grad():
                model.train()
                _epoch(model, batches, optimizer, settings, teacher, epoch, total, progress)
                if checkpoint is not None:
                    _save(model, optimizer, checkpoint, epoch + 1, settings)
    finally:
        for module, training in modes.items():
            module.training = training


def _epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.SGD,
    settings: FineTune,
    teacher: fx.GraphModule | None,
    epoch: int,
    total: int | None,
    progress: Progress | None,
) -> None:
    device = device_of(model)
    loss_sum = count = 0.0
    for sample in samples_of(batches).read("fine-tuning"):
        sample, k = sample.to(device), sample.number
        done = epoch + (k / total if total else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, settings)
        try:
            loss = _loss(model, sample, teacher, settings)
        except NotFiniteError as error:
            raise DataError(
                f"fine-tuning: the loss of batch {k} in epoch {epoch + 1} is not finite; lower the learning rate or check the data"
            ) from error
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        loss_sum += float(loss.detach()) * sample.count
        count += sample.count
        if progress:
            text = f"epoch {epoch + 1}/{settings.epochs}  loss {loss_sum / count:.3f}"
            progress.tick(epoch * (total or 0) + k + 1, settings.epochs * total if total else None, text)
    if not count:
        raise DataError("fine-tuning: the training data is empty")


def rate_at(epoch: float, settings: FineTune) -> float:
    """Learning rate after `epoch` epochs (fractions count): linear warm-up over a tenth of an epoch, then cosine."""
    warm_up = min(epoch / 0.1, 1.0) if epoch < 0.1 else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(epoch / settings.epochs, 1.0)))
    return settings.learning_rate * max(warm_up, 0.05) * cosine


def _loss(model: nn.Module, sample: Sample, teacher: fx.GraphModule | None, settings: FineTune) -> Tensor:
    outputs = sample.outputs(model)
    loss = sample.loss(outputs)
    if teacher is None or settings.distillation == 0:
        return loss
    with torch.no_grad(), eval_mode(teacher):
        wanted = sample.outputs(teacher)
    distance, scale = _softened(sample.task.distance(wanted), settings.temperature)
    apart = mean_of(distance.terms(distance.kept(outputs), distance.kept(wanted))).to(loss.dtype)
    return (1 - settings.distillation) * loss + settings.distillation * scale * apart


def _softened(distance: Distance, temperature: float) -> tuple[Distance, float]:
    """Of class probabilities at a temperature t, with t² to keep the gradients of both parts on one scale (Hinton et al., 2.1)."""
    if isinstance(distance, ClassDivergence):
        return ClassDivergence(temperature), temperature**2
    return distance, 1.0


def _optimizer(model: nn.Module, settings: FineTune) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:  # a network for deployment: nothing was left out of training on purpose
        parameters = list(model.requires_grad_(True).parameters())
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def _save(model: nn.Module, optimizer: torch.optim.SGD, path: Path, epochs: int, settings: FineTune) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{names[id(parameter)]}"] = state["momentum_buffer"]
    save_tensors(path, tensors, {"epochs": str(epochs), "settings": json.dumps(settings.to_dict(), sort_keys=True)})


def _resume(model: nn.Module, optimizer: torch.optim.SGD, path: Path | None, settings: FineTune) -> int:
    if path is None or not path.exists():
        return 0
    tensors = load_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("settings") != json.dumps(settings.to_dict(), sort_keys=True):
        raise DataError(f"{path} was written with other fine-tuning settings; remove it to start over")
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except RuntimeError as error:
        raise DataError(f"{path} is a checkpoint of another network; remove it to start over") from error
    for name, parameter in model.named_parameters():
        if f"momentum.{name}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(parameter.device)
    done = metadata.get("epochs", "")
    if not done.isdecimal() or int(done) > settings.epochs:
        raise DataError(f"{path} does not say how many epochs are done; remove it to start over")
    check_finite(tensors, path)
    return int(done)
