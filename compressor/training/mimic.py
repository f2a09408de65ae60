"""Feature mimicking: a compressed network learns to give the original's features, without a label.

    original     images ──► … ──► f  ──► head          loss = E||f - f'||² / E||f||²
    compressed   images ──► … ──► f' ──► head

f is what the last layers read, in front of the pooling (Wang, Liu et al., "MiR", 2022; Wang and Wu, "PRACTISE", 2023). Some hundred
images are enough, since every one of them says some thousand numbers, where a label says one.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

from compressor.errors import DataError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.layers.product import is_product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.tracing.trace import device_of, quiet_deepcopy
from compressor.passes.transforms.remove_branches import branches_named, rewiring
from compressor.values.files import load_tensors, save_tensors
from compressor.values.plan import Plan
from compressor.values.progress import Progress
from compressor.values.settings import check

_LOOKS = 8  # how often the images spared are looked at, and a checkpoint is written
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam
_PARTS = ("model", "best", *_MOMENTS)  # of a checkpoint
_SPARED = 256  # of these images at most, and a fifth of all


@dataclass(frozen=True)
class Mimic:
    """Settings of feature mimicking.

    Attributes:
        steps: Of Adam; a twentieth of them warm up, then a cosine to zero.
        batch: Images of a step.
        learning_rate: At its peak.

    Raises:
        DataError: A setting is out of range.
    """

    steps: int = 500
    batch: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, DataError, {"steps": (1, 1e9), "batch": (1, 1e6), "learning_rate": (0, math.inf)})

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {"mimic": True, **asdict(self)}


@dataclass(frozen=True)
class Mimicked:
    """What came of it: squared errors of the features on the images kept apart, as shares of the squares of the original's.

    Attributes:
        before: Of the network as it was given.
        after: Of the best network seen; at most as much.
    """

    before: float
    after: float


def mimic(
    model: fx.GraphModule,
    channels: ChannelGraph,
    plan: Plan,
    images: Calibration,
    settings: Mimic,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mimicked:
    """Train `model` in place; batch norms stay as they are. The best of eight states is taken, and the beginning is one of them.

    Args:
        model: The network of the plan, repaired or not.
        channels: The analysis of the original.
        plan: What stays of it.
        images: Without labels; a fifth of them, at most 256, are kept apart to judge by.
        settings: The settings.
        checkpoint: Written after every eighth of the steps; if it is there already, training goes on from it.
        seed: Of the order of the images.
        progress: Where to say how far it is.

    Raises:
        DataError: The loss is not finite, or the checkpoint is of another network.
    """
    pairs = features_of(channels, plan, model)
    teacher = _showing(channels.graph, [pair[0] for pair in pairs])
    student = _showing(model, [pair[1] for pair in pairs])
    spared = images.first(min(_SPARED, max(images.images // 5, 1)))
    used = images.after(spared.images)
    used = used if used.images else images  # of a network of one batch size, there may be one batch
    loss = _Loss(teacher, student, [pair[2] for pair in pairs], device_of(model))
    parameters = [p for p in model.parameters() if p.requires_grad] or list(model.requires_grad_(True).parameters())
    run = _Run(model, parameters, settings, checkpoint)
    with eval_mode(channels.graph), eval_mode(model):  # batch norms keep the statistics that the repair has given them
        start = loss.over(spared)
        run.resume(start)
        while run.step < settings.steps:
            batch = _drawn(used, settings.batch, seed * 1_000_003 + run.step)
            run.descend(loss(batch))
            if run.step % max(settings.steps // _LOOKS, 1) == 0 or run.step == settings.steps:
                run.look(loss.over(spared))
            if progress:
                progress.tick(run.step, settings.steps, f"features {run.last / max(start, 1e-12):.3f} of their first error")
        run.take_best()
    return Mimicked(start, run.best)


def features_of(channels: ChannelGraph, plan: Plan, narrowed: fx.GraphModule) -> list[tuple[str, str, Tensor | None]]:
    """What the last layers of a network read, in front of pooling and flattening.

    Returns:
        `(node of the original, node of the narrowed network, its channels that are left)`; None where all are. Where some are
        gone, the outputs as well, since the last layer has to do without them; with all of them, outputs beside features did worse.
    """
    graph = channels.graph.graph
    wired = rewiring(graph, branches_named(channels.branches, plan.removed))
    there = {node.name for node in narrowed.graph.nodes}
    masks, found = channels.kept_masks(plan), []
    for node in _fronts(channels.graph):
        name = wired.instead.get(node.name, node.name)
        if name not in there:
            continue
        (value,) = channels.walk.values.get(node.name, (None,))
        labels = value.axes.get(1) if value is not None else None
        kept = None if labels is None else channels.kept_labels(labels, masks)
        found.append((node.name, name, None if kept is None or kept.all() else torch.from_numpy(np.flatnonzero(kept))))
    if found and all(kept is None for *_, kept in found):
        return found
    outputs = [(node.name, wired.instead.get(node.name, node.name)) for node in _results(graph)]
    return [*found, *((name, left, None) for name, left in outputs if left in there)]


def _results(graph: fx.Graph) -> list[fx.Node]:
    return list(next(node for node in graph.nodes if node.op == "output").all_input_nodes)


def _fronts(graph: fx.GraphModule) -> list[fx.Node]:
    """What the last layers on the way to each output read, in front of what only makes it smaller or lays it out anew."""
    found: dict[fx.Node, None] = {}
    waiting, seen = list(_results(graph.graph)), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if not is_product(graph, node):
            waiting += node.all_input_nodes
            continue
        source = node.all_input_nodes[0]
        while len(source.all_input_nodes) == 1 and _only_lays_out(graph, source):
            source = source.all_input_nodes[0]
        if source.op != "placeholder":
            found[source] = None
    return sorted(found)


def _only_lays_out(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes its input smaller, gives it another shape, or is a dropout."""
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), nn.modules.dropout._DropoutNd)
    own, before = shapes_of(node), shapes_of(node.all_input_nodes[0])
    return len(own) == len(before) == 1 and own != before and math.prod(own[0]) <= math.prod(before[0])


def _showing(graph: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A graph that returns the values of some nodes, with the modules of this one."""
    shown = quiet_deepcopy(graph.graph)
    shown.set_codegen(fx.graph.CodeGen())
    nodes = {node.name: node for node in shown.nodes}
    output = next(node for node in shown.nodes if node.op == "output")
    output.args = (tuple(nodes[name] for name in names),)
    for node in reversed(list(shown.nodes)):
        if not node.users and node.op not in ("output", "placeholder"):
            shown.erase_node(node)
    return fx.GraphModule(graph, shown)


class _Loss:
    """Squared error of features, as shares of the squares of the original's."""

    def __init__(
        self, teacher: fx.GraphModule, student: fx.GraphModule, kept: Sequence[Tensor | None], device: torch.device
    ) -> None:
        self._teacher, self._student, self._device = teacher, student, device
        self._kept = [None if own is None else own.to(device) for own in kept]

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        batch = [x.to(self._device) for x in batch]
        with torch.no_grad():
            wanted = [
                y if own is None else y.index_select(1, own) for y, own in zip(self._teacher(*batch), self._kept, strict=True)
            ]
        shares = [
            (a - b).square().sum() / b.square().sum().clamp_min(1e-12) for a, b in zip(self._student(*batch), wanted, strict=True)
        ]
        return torch.stack(shares).mean()

    def over(self, images: Calibration) -> float:
        """Over all of some images."""
        with torch.no_grad():
            found = [(float(self(batch)), len(batch[0])) for batch in images.batches]
        return sum(loss * count for loss, count in found) / sum(count for _, count in found)


def _drawn(images: Calibration, count: int, seed: int) -> tuple[Tensor, ...]:
    """Some images at random, the same for a seed; of a network that takes batches of one size, a whole batch."""
    generator = torch.Generator().manual_seed(seed)
    if images.fixed:
        return images.batches[int(torch.randint(len(images.batches), (), generator=generator))]
    sizes = torch.tensor([len(batch[0]) for batch in images.batches])
    ends = sizes.cumsum(0)
    chosen = torch.randint(int(ends[-1]), (count,), generator=generator)
    places = torch.searchsorted(ends, chosen, right=True)
    rows = (chosen - (ends - sizes)[places]).tolist()
    inputs = range(len(images.batches[0]))
    return tuple(torch.stack([images.batches[b][k][row] for b, row in zip(places.tolist(), rows, strict=True)]) for k in inputs)


class _Run:
    """The state of a descent, and the best network on its way."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], settings: Mimic, checkpoint: Path | None) -> None:
        self._model, self._settings, self._checkpoint = model, settings, checkpoint
        # not SGD: the rate that one network learns best by makes another diverge (0.1 and 0.005 were the best of two)
        self._optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        self.step, self.best, self.last = 0, math.inf, math.inf
        self._best_state: dict[str, Tensor] = {}

    def descend(self, loss: Tensor) -> None:
        """One step."""
        if not torch.isfinite(loss):
            raise DataError(f"feature mimicking: the loss of step {self.step + 1} is not finite; lower the learning rate")
        done, warm = self.step / self._settings.steps, max(self._settings.steps // 20, 1)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * min((self.step + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * done))
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self.step += 1

    def look(self, loss: float) -> None:
        """Remember the network where it is the best so far, and write down where the descent is."""
        self.last = loss
        if loss < self.best:
            self.best = loss
            self._best_state = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        if self._checkpoint is not None:
            names = {id(p): name for name, p in self._model.named_parameters()}
            moments = [{names[id(p)]: own[key] for p, own in self._optimizer.state.items()} for key in _MOMENTS]
            parts = dict(zip(_PARTS, (self._model.state_dict(), self._best_state, *moments), strict=True))
            tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
            state = {"step": self.step, "best": self.best, "last": self.last, "settings": self._settings.to_dict()}
            save_tensors(self._checkpoint, tensors, {"mimic": json.dumps(state, sort_keys=True)})

    def resume(self, start: float) -> None:
        """Go on from the checkpoint, if there is one; else the beginning is the best so far."""
        if self._checkpoint is None or not self._checkpoint.exists():
            self.look(start)
            return
        tensors = load_tensors(self._checkpoint)
        with safe_open(self._checkpoint, "pt") as file:
            state = json.loads((file.metadata() or {}).get("mimic", "{}"))
        if state.get("settings") != self._settings.to_dict():
            raise DataError(f"{self._checkpoint} was written with other settings; remove it to start over")
        parts = {part: {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")} for part in _PARTS}
        try:
            self._model.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise DataError(f"{self._checkpoint} is a checkpoint of another network; remove it to start over") from error
        for name, parameter in self._model.named_parameters():
            if name in parts["step"]:
                self._optimizer.state[parameter] = {key: parts[key][name].to(parameter.device) for key in _MOMENTS}
        self._best_state = parts["best"]
        self.step, self.best, self.last = int(state["step"]), float(state["best"]), float(state["last"])

    def take_best(self) -> None:
        """The model becomes the best that was seen."""
        self._model.load_state_dict(self._best_state)
