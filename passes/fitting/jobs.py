"""Jobs: the layers of a narrowed network that are to be fitted, with what the plan has done to each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from compressor.errors import PassError
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, affine, inputs_read, kept_channels, readers_of
from compressor.passes.fitting.rank_reduction import reduced
from compressor.passes.layers.factorizable import sizes_of
from compressor.passes.layers.forms import Stage
from compressor.passes.layers.product import Product
from compressor.passes.transforms.factorize_conv import STAGES
from compressor.passes.transforms.remove_branches import branches_named, rewiring
from compressor.values.plan import Factorization, Plan


@dataclass(frozen=True, eq=False)
class Job:
    """A layer to be fitted.

    Attributes:
        reader: The layer, and what stands behind it.
        source: Node that it reads.
        whole: It in the original network.
        product: It in the narrowed one.
        rows: (kept outputs,): which outputs stay.
        columns: (blocks, kept columns): which columns of each block stay, where blocks do not go as a whole.
        loses: Whether it lost inputs.
        factorization: What it becomes afterwards: its new weight is one that this writes exactly.
        shortcut: Node of the narrowed network that is added to its output, or to that of the norm behind it.
        end: Node of the narrowed network that has the sum, else the norm's output, else the layer's.
        target: Node of the original that the sum (the norm's output, the layer's) is to give, where branches behind it are gone
            and it has to take over what they did; None for what it gave itself.
    """

    reader: Reader
    source: str
    whole: Product
    product: Product
    rows: Tensor
    columns: Tensor
    loses: bool
    factorization: Factorization | None = None
    shortcut: str | None = None
    end: str = ""
    target: str | None = None

    @property
    def changes(self) -> bool:
        """Whether the plan does something to it."""
        return self.loses or self.factorization is not None or self.target is not None

    def reduced(self, graph: fx.GraphModule, matrix: Tensor, covariance: Tensor | None) -> Tensor:
        """The nearest weight, by what it makes of features with this covariance, that the factorization can write.

        How it writes it is noted at the layer's node.
        """
        if self.factorization is None:
            return matrix
        scale = affine(graph, self.reader.norm, self.product.outputs)[0].reshape(matrix.shape[:2])
        found = reduced(matrix, sizes_of(self.product.module), self.factorization, covariance, scale)
        node = next(node for node in graph.graph.nodes if node.name == self.reader.node)
        node.meta[STAGES] = _as_stored(found.stages) if self.product.transposed and found.stages else found.stages
        return found.matrix


def _as_stored(stages: Sequence[Sequence[Stage]]) -> list[list[Stage]]:
    """Sequences of a transposed convolution, whose kernel runs the other way in its matrix; see `Product.matrix`."""
    return [[replace(one, weight=np.flip(one.weight, tuple(range(2, one.weight.ndim)))) for one in own] for own in stages]


def jobs_of(
    channels: ChannelGraph, masks: Sequence[NDArray[np.bool_]], narrowed: fx.GraphModule, plan: Plan | None = None
) -> list[Job]:
    """Every layer of the narrowed network that can be fitted, in the order of the graph.

    Args:
        channels: The analysis of the original network.
        masks: What stays of each group.
        narrowed: The narrowed network.
        plan: It was narrowed by, where layers read a part of a stream or are factorized.
    """
    factors = {one.layer: one for one in plan.factors} if plan is not None else {}
    reads = inputs_read(channels, plan, masks) if plan is not None else {}
    nodes = {node.name: node for node in narrowed.graph.nodes}
    wired = rewiring(channels.graph.graph, branches_named(channels.branches, plan.removed if plan is not None else ()))
    jobs = []
    for reader in readers_of(channels).values():
        if reader.node not in nodes:
            continue
        whole, product = Product(channels.graph.get_submodule(reader.layer)), Product(narrowed.get_submodule(reader.layer))
        inputs = reads.get(reader.node, kept_channels(reader.inputs, masks, channels, whole.inputs))
        rows = torch.from_numpy(np.flatnonzero(kept_channels(reader.outputs, masks, channels, whole.outputs)))
        device = product.weight.device
        stays = inputs.repeat(whole.kernel).reshape(whole.blocks, -1)
        columns = [torch.from_numpy(np.flatnonzero(own)) for own in stays if own.any()]  # a depthwise block goes as a whole
        if product.outputs != len(rows) or {len(own) for own in columns} != {product.columns}:
            raise PassError(
                f"`{reader.layer}` has {product.outputs} outputs and {product.columns} columns, the plan leaves {len(rows)} and "
                f"{len(columns[0]) if columns else 0}; this is not the original network narrowed by this plan"
            )
        node = nodes[reader.node]
        source, loses = node.all_input_nodes[0].name, not inputs.all()
        kept = torch.stack(columns).to(device)
        shortcut = wired.instead.get(reader.shortcut, reader.shortcut) if reader.shortcut else None
        shortcut = shortcut if shortcut in nodes and reader.end in nodes else None  # the other side of the addition may be gone
        end = wired.instead.get(reader.end, reader.end)
        own = factors.get(reader.layer)
        job = Job(reader, source, whole, product, rows.to(device), kept, loses, own, shortcut, end, wired.means.get(end))
        jobs.append(job)
    return jobs


def jobs_behind(channels: ChannelGraph, plan: Plan, jobs: Sequence[Job]) -> list[Job]:
    """The jobs from the first on that the plan does something to, or to what it reads: in front of it all is as it was."""
    place = {node.name: k for k, node in enumerate(channels.graph.graph.nodes)}
    behind = min((place[branch.at] for branch in channels.branches if branch.name in plan.removed), default=len(place))
    first = next((k for k, job in enumerate(jobs) if job.changes or place[job.reader.node] > behind), len(jobs))
    return list(jobs[first:])
