"""Single layers on a target: as they are, with fewer inputs, behind a gather, or as a sequence.

A factorization is a saving in MACs and one layer more; whether it is one in milliseconds is measured: `choices` times every
layer that a plan factorizes beside the same layer as it would be without, in one session.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn

from compressor.errors import BackendError
from compressor.passes.channels.analyze import ChannelGraph, analyze
from compressor.passes.channels.layer_costs import Layer
from compressor.passes.layers.product import Conv
from compressor.passes.tracing.trace import trace
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.measuring.measure import measure
from compressor.runtime.timing.protocol import Protocol
from compressor.values.plan import Factorization, Plan
from compressor.values.target import Target

logger = logging.getLogger(__name__)

_RANKS = 16  # measured per layer
_SAME = 0.99  # of a latency: less of a difference is noise
QUICK = Protocol(half_width=0.01, max_samples=300, max_s=2.0)

Once = Callable[[str, Callable[[], dict[str, object]]], dict[str, object]]


@dataclass(frozen=True)
class Variant:
    """One way to build a layer.

    Attributes:
        inputs: Channels that come in.
        outputs: Channels that are made.
        reads: How many of the inputs it reads, through a gather where that is not all.
        factorization: Form and ranks; None for the plain layer.
    """

    inputs: int
    outputs: int
    reads: int
    factorization: tuple[str, tuple[int, ...]] | None = None

    @property
    def plain(self) -> "Variant":
        """The same layer as it is without the sequence."""
        return replace(self, factorization=None)


@dataclass(frozen=True)
class Choice:
    """What was measured of one layer that a plan factorizes.

    Attributes:
        layer: Its name.
        dense_ms: As it is, at the widths of the plan.
        changed_ms: As a sequence.
        faster: Whether the sequence is, by more than the noise: the 95 % intervals do not overlap.
        failure: Why it could not be measured; it then counts as not faster.
    """

    layer: str
    dense_ms: float
    changed_ms: float
    faster: bool
    failure: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Choice":
        """From plain data, whatever else is in it."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    def __str__(self) -> str:
        """On one line."""
        if self.failure:
            return f"{self.layer}: left plain, it cannot be measured ({self.failure})"
        word = "faster" if self.faster else "not faster: left plain"
        return f"{self.layer}: dense {self.dense_ms:.4f} ms, changed {self.changed_ms:.4f} ms, {word}"


def choices(channels: ChannelGraph, plan: Plan, target: Target, once: Once, seed: int = 0) -> list[Choice]:
    """Measure what a plan's factorizations bring, layer by layer; equal layers are measured once.

    Args:
        channels: The analysis of the network.
        plan: The plan; a gather that it puts before a layer is there in any case.
        target: Where.
        once: Keeps measurements under a name.
        seed: Of inputs and order.
    """
    found = []
    for layer, variant in variants_of(channels, plan).items():
        if variant.factorization is not None:
            work = partial(_compared, channels, layer, variant, target, seed)
            found.append(Choice.of({"layer": layer, **once(f"choice {kind_of(channels, layer)} {variant}", work)}))
            logger.info("%s", found[-1])
    return found


def _compared(channels: ChannelGraph, layer: str, variant: Variant, target: Target, seed: int) -> dict[str, object]:
    graphs = dict(zip(("dense", "changed"), pieces(channels, layer, [variant.plain, variant]), strict=True))
    try:
        measured = measure(graphs, target, seed, QUICK)
    except BackendError as error:
        return {"dense_ms": 0.0, "changed_ms": 0.0, "faster": False, "failure": str(error)}
    dense, changed = measured["dense"], measured["changed"]
    faster = changed.interval_ms[1] < dense.interval_ms[0]
    return {"dense_ms": dense.median_ms, "changed_ms": changed.median_ms, "faster": faster}


def times(
    channels: ChannelGraph, layer: str, variants: Sequence[Variant], target: Target, once: Once, seed: int = 0
) -> list[float]:
    """Milliseconds of some ways to build a layer, measured in one session.

    Raises:
        BackendError: One of them cannot be built.
    """

    def work() -> dict[str, object]:
        graphs = {str(k): graph for k, graph in enumerate(pieces(channels, layer, variants))}
        found = measure(graphs, target, seed, QUICK)
        return {"ms": [found[str(k)].median_ms for k in range(len(variants))]}

    named = [list(asdict(variant).values()) for variant in variants]
    return cast("list[float]", once(f"pieces {kind_of(channels, layer)} {named}", work)["ms"])


def rank_edges(
    channels: ChannelGraph, layer: str, form: str, full: int, align: int, target: Target, once: Once, seed: int = 0
) -> list[int]:
    """Right edges of the staircase of a form's one rank: ranks that no larger one beats, ascending.

    Args:
        channels: The analysis of the network.
        layer: Its name.
        form: A form of one rank.
        full: The largest rank.
        align: Ranks that are measured are multiples of this, at most sixteen of them.
        target: Where.
        once: Keeps measurements under a name.
        seed: Of inputs and order.
    """
    whole = variants_of(channels, Plan.keep({}, factors=[Factorization(layer, form, (full,))]))[layer]
    step = -(-full // (_RANKS * align)) * align
    ranks = sorted({*range(step, full, step), full})
    try:
        found = times(channels, layer, [replace(whole, factorization=(form, (r,))) for r in ranks], target, once, seed)
    except BackendError as error:
        logger.info("ranks of %s: multiples of the target's align (%s)", layer, error)
        return ranks
    return [rank for k, rank in enumerate(ranks) if found[k] < _SAME * min(found[k + 1 :], default=math.inf)]


def variants_of(channels: ChannelGraph, plan: Plan) -> dict[str, Variant]:
    """How a plan builds the layers that it factorizes or lets read through a gather."""
    row = channels.widths([channels.structure(plan)])
    factors = {one.layer: one for one in plan.factors}
    reads = dict(plan.reads)
    found = {}
    for name in dict.fromkeys([*reads, *factors]):
        blocks, sizes = Layer.of(channels, name).sizes(channels, row)
        inputs, outputs = blocks * sizes.inputs, blocks * sizes.outputs
        one = factors.get(name)
        chosen = (one.form, one.ranks) if one else None
        found[name] = Variant(inputs, outputs, min(len(reads.get(name, range(inputs))), inputs), chosen)
    return found


def kind_of(channels: ChannelGraph, layer: str) -> str:
    """What two layers have in common that take equally long at equal widths."""
    found = Layer.of(channels, layer)
    return f"{found.module} on {'x'.join(map(str, found.before))}"


def piece(channels: ChannelGraph, layer: str, variant: Variant) -> fx.GraphModule:
    """One layer as a network of its own, with random weights."""
    (found,) = pieces(channels, layer, [variant])
    return found


def pieces(channels: ChannelGraph, layer: str, variants: Sequence[Variant]) -> list[fx.GraphModule]:
    """Several of them; each plain layer is traced once."""
    found = Layer.of(channels, layer)
    plain: dict[Variant, ChannelGraph] = {}
    graphs = []
    for variant in variants:
        if variant.plain not in plain:
            module = _resized(found.module, variant)
            shape = (2, variant.inputs, *found.before) if isinstance(module, Conv) else (2, *found.before, variant.inputs)
            plain[variant.plain] = analyze(trace(nn.Sequential(module).eval(), (torch.zeros(shape),)))
        factors = [Factorization("0", *variant.factorization)] if variant.factorization else []
        reads = {"0": range(variant.reads)} if variant.reads < variant.inputs else {}
        graphs.append(applied(Plan.keep({}, reads=reads, factors=factors), plain[variant.plain]))
    return graphs


def _resized(module: nn.Module, variant: Variant) -> nn.Module:
    """A layer of the same kind with other widths."""
    bias = cast(object, module.bias) is not None
    if not isinstance(module, Conv):
        return nn.Linear(variant.inputs, variant.outputs, bias)
    depthwise = module.groups > 1 and module.groups == module.in_channels
    options: dict[str, Any] = {
        "stride": module.stride, "padding": module.padding, "dilation": module.dilation, "bias": bias,
        "groups": variant.inputs if depthwise else module.groups, "padding_mode": module.padding_mode,
    }  # fmt: skip
    if module.transposed:
        options["output_padding"] = module.output_padding
    return cast(nn.Module, type(module)(variant.inputs, variant.outputs, module.kernel_size, **options))
