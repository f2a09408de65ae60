"""What a candidate of a search is worth: remove, repair as far as the search can afford, look at a hold-out.

The test set is never seen: the hold-out is the first images of `validate`, the same for every candidate.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import fx

from compressor.data.seeding import seeded
from compressor.errors import DataError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import readers_of
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.fit_layers import fit_on_statistics
from compressor.passes.fitting.jobs import jobs_of
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics, collect
from compressor.passes.statistics.original_outputs import Original, Remembered
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.trace import DYNAMIC, device_of, quiet_deepcopy
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.tasks.samples import Batches, Sample, first_samples, in_layout, read
from compressor.training.evaluate import by_function, counted, recalibrate
from compressor.values.loaders import is_missing
from compressor.values.plan import Plan
from compressor.values.settings import check

logger = logging.getLogger(__name__)

_RANGES = {"holdout": (1, math.inf), "images": (8, math.inf), "steps": (1, math.inf), "learning_rate": (1e-12, math.inf)}


@dataclass(frozen=True)
class Fitness:
    """How candidates are judged.

    Attributes:
        repair: What is done to a candidate first: nothing; `train`ing for a few steps (LeGR's tau); batch norms are
            `recalibrate`d, cumulatively, from nothing (AACP's PSAE); or its layers are `compensate`d in closed form, then
            recalibrated.
        objective: `loss` (the task's, as LeGR) or `metric` (as AACP's accuracy).
        holdout: Images of the hold-out that candidates are looked at on.
        images: Images that batch norms and closed forms are fitted on.
        steps: Of training.
        learning_rate: Of training; momentum 0.9, weight decay 5e-4, as published.
        features: Whose features closed forms are fitted on: those of the `narrowed` network, layer after layer, as in the end; or
            the `original`'s, collected once for all candidates, which takes half the time. Asked for half the latency of a
            ResNet-56, `LeGR` keeps 83.46 % at a measured 0.500 by `narrowed`, 84.39 % at 0.504 by `original`
            (`tools/bench_search.py --goals latency:0.5 --align 8 --seeds 0`).

    Raises:
        DataError: A setting is out of range.
    """

    repair: Literal["none", "train", "recalibrate", "compensate"] = "recalibrate"
    objective: Literal["loss", "metric"] = "loss"
    holdout: int = 1000
    images: int = 500
    steps: int = 200
    learning_rate: float = 0.01
    features: Literal["original", "narrowed"] = "narrowed"

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, DataError, _RANGES)

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Worth:
    """What a candidate turned out to be worth.

    Attributes:
        loss: Of the task, on the hold-out.
        metric: Of the task, on the same; None where nothing but the loss was asked for.
        images: Images that went through a network for it.
        seconds: Time that it took.
    """

    loss: float
    metric: float | None
    images: int
    seconds: float


class Judge:
    """Judges candidates of one network; the same plan is worth the same every time.

    Args:
        channels: The analysis of the network.
        fitness: How.
        holdout: What candidates are looked at on: `Samples` or what they read, or pairs `(inputs, labels)` of a classifier.
        calibration: Images without labels; not needed for `none` and `train`.
        train: The same, for `train`.
        seed: Of the order of training.

    Raises:
        DataError: Data that the repair needs are not there.
    """

    def __init__(
        self,
        channels: ChannelGraph,
        fitness: Fitness,
        holdout: Batches | Sequence[Sample],
        calibration: Calibration | None,
        train: Batches | Sequence[Sample] | None = None,
        seed: int = 0,
    ) -> None:
        self._channels, self.fitness, self._seed = channels, fitness, seed
        found = first_samples(holdout, fitness.holdout, not channels.graph.meta[DYNAMIC])
        self._layout = _layout(channels.graph, found[0])
        self._holdout = [sample.laid_out(self._layout) for sample in found]
        self._calibration = calibration.first(fitness.images) if calibration is not None else None
        self._train: list[Sample] = []
        if fitness.repair == "train":
            if train is None or is_missing(train):
                raise DataError("a fitness that trains needs training data: pass train=…")
            self._train = _steps(train, fitness.steps)
        elif fitness.repair != "none" and self._calibration is None:
            raise DataError(f"a fitness that {fitness.repair}s needs images: pass calibrate=… or train=…")
        self._statistics: dict[str, Statistics] = {}
        self._original: Original | None = None
        if fitness.repair == "compensate" and self._calibration is not None and fitness.features == "narrowed":
            self._original = Remembered(channels, self._calibration, _CLOSED.positions, seed, _CLOSED.memory_mb)
        elif fitness.repair == "compensate" and self._calibration is not None:
            layers, memory = list(readers_of(channels)), _CLOSED.memory_mb << 19
            with eval_mode(channels.graph):
                self._statistics = collect(channels.graph, layers, self._calibration, _CLOSED.positions, memory, seed)

    def __call__(self, plan: Plan) -> Worth:
        """Judge a candidate.

        Raises:
            DataError: Its outputs are not finite.
            PlanError: The plan does not fit the network.
        """
        begun = time.monotonic()
        graph = RemoveChannels(plan, self._channels)(self._channels.graph).graph.eval()
        if self.fitness.repair != "compensate":  # which keeps layers whole, with weights that are as good as factorized
            graph = FactorizeConv(plan.factors)(graph).graph
        graph, seen = self._repaired(plan, graph)
        graph = graph.to(memory_format=self._layout)  # type: ignore[call-overload]
        loss = count = 0.0
        device, metric = device_of(graph), self._holdout[0].task.metric
        meter = metric.meter() if metric.meter is not None and self.fitness.objective == "metric" else None
        with torch.no_grad():
            for sample in (own.to(device) for own in self._holdout):
                outputs = sample.outputs(graph)
                loss += float(sample.loss(outputs)) * sample.count
                count += sample.count
                if meter is not None:
                    counted(meter, sample, outputs)
        value = None
        if self.fitness.objective == "metric":
            value = metric.value(meter) if meter is not None else by_function(graph, self._holdout)
        return Worth(loss / count, value, seen + int(count), time.monotonic() - begun)

    def _repaired(self, plan: Plan, graph: fx.GraphModule) -> tuple[fx.GraphModule, int]:
        repair = self.fitness.repair
        if repair == "train":
            self._trained(graph)
            return graph, sum(sample.count for sample in self._train)
        if repair == "none" or self._calibration is None:
            return graph, 0
        seen = self._calibration.images
        if repair == "compensate" and self.fitness.features == "narrowed":
            settings = replace(_CLOSED, features="narrowed", images=seen)
            return Compensate(self._channels, plan, self._calibration, settings, self._seed, self._original).run(graph).graph, seen
        if repair == "compensate":
            fitted = set()
            for job in jobs_of(self._channels, self._channels.kept_masks(plan), graph, plan):
                if job.changes and job.product.blocks == job.whole.blocks:
                    fit_on_statistics(graph, job, self._statistics[job.reader.node], _CLOSED)
                    fitted.add(job.reader.layer)
            graph = FactorizeConv([one for one in plan.factors if one.layer not in fitted])(graph).graph
        graph = graph.to(memory_format=self._layout)  # type: ignore[call-overload]
        pairs = [(tuple(in_layout(x, self._layout) for x in batch), None) for batch in self._calibration.batches]
        norms = recalibrate(graph, pairs, len(pairs))
        return graph, seen if norms else 0

    def _trained(self, graph: fx.GraphModule) -> None:
        device = device_of(graph)
        graph.requires_grad_(True)  # networks for deployment often ask for none
        optimizer = torch.optim.SGD(graph.parameters(), lr=self.fitness.learning_rate, momentum=0.9, weight_decay=5e-4)
        graph.train()
        with seeded(self._seed), torch.enable_grad():
            for sample in (own.to(device) for own in self._train):
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(sample.loss(sample.outputs(graph)))
                optimizer.step()
        graph.eval()


def samples(
    fitness: Fitness, validate: Batches, train: Batches | None, seed: int, whole: bool = False
) -> tuple[list[Sample], list[Sample]]:
    """What candidates are judged on, and the batches that they are trained on.

    They are the same for a seed, wherever candidates are judged and whatever was drawn before.

    Args:
        fitness: How many.
        validate: `Samples`, or pairs `(inputs, labels)` of a classifier.
        train: The same, for `train`.
        seed: Of what they are drawn by.
        whole: Whether batches are taken as a whole, or cut after so many images; for networks that take one size alone.

    Raises:
        DataError: There are none.
    """
    with seeded(seed, validate):
        holdout = first_samples(validate, fitness.holdout, whole)
    if fitness.repair != "train":
        return holdout, []
    if train is None:
        raise DataError("a fitness that trains needs training data: pass train=…")
    with seeded(seed, train):
        return holdout, _steps(train, fitness.steps)


_CLOSED = Compensation("original", ridge=1e-4, positions=12)


def _steps(batches: Batches | Sequence[Sample], count: int) -> list[Sample]:
    """So many batches, beginning again where they end."""
    return list(itertools.islice(_endless(batches), count))


def _endless(batches: Batches | Sequence[Sample]) -> Iterator[Sample]:
    while True:
        empty = True
        for sample in read(batches, "training"):
            empty = False
            yield sample
        if empty:
            raise DataError("the training data is empty")


def _layout(graph: fx.GraphModule, sample: Sample) -> torch.memory_format:
    """Channels last, which CPUs and tensor cores run faster (1.5 times on a ResNet-56), where the network allows it."""
    if all(x.dim() != 4 for x in sample.inputs):
        return torch.contiguous_format
    few = sample.first(2) if graph.meta[DYNAMIC] else sample
    try:
        graph = quiet_deepcopy(graph).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            few.laid_out(torch.channels_last).to(device_of(graph)).outputs(graph)
    except RuntimeError:  # a view that wants the usual order
        return torch.contiguous_format
    return torch.channels_last
