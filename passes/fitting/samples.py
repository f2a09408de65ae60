"""`Samples`: what a layer of a narrowed network reads, and what it should give there, batch by batch."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from compressor.passes.channels.readers import affine
from compressor.passes.fitting.jobs import Job
from compressor.passes.fitting.regression import Facts
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.collect import check_finite
from compressor.passes.statistics.moments import Moments, Targets
from compressor.passes.statistics.original_outputs import Original
from compressor.passes.statistics.partial_run import Prefix

aten = torch.ops.aten
_LINEAR: dict[object, tuple[float, float]] = {
    aten.relu: (0.0, math.inf), aten.relu_: (0.0, math.inf), aten.relu6: (0.0, 6.0), aten.relu6_: (0.0, 6.0),
}  # fmt: skip
_NEGLIGIBLE = 1e-3  # of the largest scale of a norm: an output scaled by less cannot make up for a shortcut


class Samples:
    """What a layer of the narrowed network reads and what it should give, batch by batch."""

    def __init__(self, graph: fx.GraphModule, job: Job, original: Original, own: Prefix, settings: Compensation) -> None:
        self._job, self._original, self._own = job, original, own
        self._memory = settings.memory_mb << 19
        norm, shortcut = job.reader.norm, job.shortcut
        self._wanted = tuple(own[job.rows] for own in affine(graph, norm, job.whole.outputs))
        self._scale, self._shift = affine(own.graph, norm, len(job.rows))
        self._sure = self._scale.abs() > _NEGLIGIBLE * self._scale.abs().max()
        self._shortcut = shortcut if shortcut is not None and own.has(shortcut) else None
        end = next((node for node in own.graph.graph.nodes if node.name == job.end), None)
        known = shortcut is None or self._shortcut is not None  # what goes into the activation
        self.linear = linear_part(end) if end is not None and known else None

    def behind_activation(self, facts: Facts, matrix: Tensor, bias: Tensor) -> Facts:
        """The same with targets that only ask for what an activation behind the layer lets through.

        Where the original is beyond the part on which the activation is the identity, every value there is as good as its own: what
        the layer gives with these weights already, or the edge, if it is on the wrong side. Each round of fitting lowers the
        error behind the activation (majorization; Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks", section
        3.2, solve the same problem with a penalty).

        Args:
            facts: Of all columns.
            matrix: The weights so far, (blocks, outputs per block, columns).
            bias: (blocks, outputs per block).
        """
        targets = Targets(facts.mean)
        for batch in range(len(self._own)):
            for x, y in self._portions(batch, (matrix, bias)):
                targets.add(x.flatten(0, 1).double(), y.flatten(0, 1))
        return replace(facts, target_mean=targets.mean, target_variance=targets.variance, cross=targets.cross)

    def facts(self, columns: slice | Tensor, rest: Tensor | None = None) -> list[tuple[Facts, int]]:
        """Of every second image, and of the others, with the number of samples of each.

        Args:
            columns: Which columns: a range, or (blocks, columns) indices.
            rest: (blocks, outputs per block, all columns): what other columns give, which is taken off the target.
        """
        halves = [Moments(), Moments()]
        image = 0
        for batch in range(len(self._own)):
            for x, y in self._portions(batch):  # (images, positions, blocks, …)
                if rest is not None:
                    y = y - torch.einsum("npgd,god->npgo", x.double(), rest)
                x = x[..., columns] if isinstance(columns, slice) else x.gather(3, columns.expand(*x.shape[:2], -1, -1))
                for parity, moments in enumerate(halves):
                    first = (parity + image) % 2
                    moments.add(x[first::2].flatten(0, 1), y[first::2].flatten(0, 1))
                image += len(x)
        found = [(Facts(m.mean, m.covariance, m.target_mean, m.target_variance, m.cross), m.count) for m in halves if m.count]
        return found if len(found) == 2 else [found[0], (found[0][0], 0)]  # one image along this axis: nothing to hold out

    def _portions(self, batch: int, fit: tuple[Tensor, Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches (images, positions, blocks, columns) and targets (images, positions, blocks, outputs), some images at a time.

        With a fit, targets are those of `behind_activation`.
        """
        job = self._job
        shown = self._original.shown(job.reader, batch, job.target)
        at = shown.at
        x = self._own.value(job.source, batch)
        check_finite(x, batch, f"input of `{job.reader.layer}`")
        y = shown.output[:, job.rows].double()
        check_finite(y, batch, f"output of `{job.reader.layer}` of the original")
        want = self._wanted[0] * y + self._wanted[1]
        shortcut = 0.0 if self._shortcut is None else job.product.values(self._own.value(self._shortcut, batch), at).double()
        if shown.target is not None and (self._shortcut is not None or job.shortcut is None):
            want = shown.target[:, job.rows].double() - shortcut
        elif self._shortcut is not None and shown.shortcut is not None:
            want += shown.shortcut[:, job.rows].double() - shortcut
        shape = (len(x), len(at), job.product.blocks, -1)
        size = job.product.portion(len(at), self._memory)
        parts = (x, want.reshape(shape), (want + shortcut).reshape(shape), y.reshape(shape))
        for images, wanted, total, own in zip(*(torch.split(part, size) for part in parts), strict=True):
            patches = job.product.patches(images, at).view(len(images), len(at), job.product.blocks, -1)
            if fit is not None and self.linear is not None:
                made = torch.einsum("npgd,god->npgo", patches, fit[0].to(patches)).double() + fit[1]
                wanted = _beyond(total, self._through_norm(made) + (total - wanted), self.linear) - (total - wanted)
            yield patches, self._before_norm(wanted, own)

    def _through_norm(self, y: Tensor) -> Tensor:
        """Through the norm, (images, positions, blocks, outputs)."""
        return y * self._scale.view(y.shape[2:]) + self._shift.view(y.shape[2:])

    def _before_norm(self, wanted: Tensor, y: Tensor) -> Tensor:
        """Through the norm, backwards; as the original has it where the norm lets next to nothing through."""
        scale, shift, sure = (own.view(y.shape[2:]) for own in (self._scale, self._shift, self._sure))
        return torch.where(sure, (wanted - shift) / scale, y)


def linear_part(node: fx.Node) -> tuple[float, float] | None:
    """Between which values everything that reads a node is the identity, beyond which it is constant; None where it is not so."""
    found = {_linear_part(user) for user in node.users}
    return found.pop() if len(found) == 1 else None


def _linear_part(activation: fx.Node) -> tuple[float, float] | None:
    packet = getattr(activation.target, "overloadpacket", None)
    if packet in (aten.hardtanh, aten.hardtanh_):
        given = cast("tuple[float, ...]", activation.args[1:])
        return (given[0] if given else -1.0), (given[1] if len(given) > 1 else 1.0)
    return _LINEAR.get(packet)


def _beyond(wanted: Tensor, found: Tensor, linear: tuple[float, float]) -> Tensor:
    """What is asked for, or what was found where both are beyond the same end of the linear part."""
    low, high = linear
    wanted = torch.where(wanted <= low, found.clamp(max=low), wanted)
    return torch.where(wanted >= high, found.clamp(min=high), wanted) if math.isfinite(high) else wanted
