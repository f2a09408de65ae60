"""How far a network's outputs are from another's: what sensitivities, plans without labels and distillation go by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.statistics.main_output import main_output
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.tracing.trace import outputs_of

Terms: TypeAlias = list[tuple[Tensor, Tensor]]
"""Of each tensor that is compared a numerator and a denominator, which are added up over batches before they are divided."""

_TEMPERATURE = 4.0  # softens the outputs that are compared: without it a few images near a boundary decide everything


@runtime_checkable
class Distance(Protocol):
    """How outputs are compared; differentiable."""

    def kept(self, outputs: Any) -> Any:
        """What of a network's outputs is compared, and has to be kept for that."""

    def terms(self, found: Any, wanted: Any) -> Terms:
        """Of two networks' `kept` for one batch."""


@dataclass(frozen=True)
class ClassDivergence:
    """Kullback-Leibler divergence between softened class probabilities, in nats; for logits (N, classes, …).

    Attributes:
        temperature: Softens both sides (Hinton et al., 2015).
    """

    temperature: float = _TEMPERATURE

    def kept(self, outputs: Any) -> Tensor:
        """Log-probabilities (N, classes, …)."""
        return F.log_softmax(main_output(outputs).double() / self.temperature, dim=1)

    def terms(self, found: Any, wanted: Any) -> Terms:
        """Summed divergence, and of how many distributions."""
        _check_shapes([found], [wanted])
        count = wanted.numel() // wanted.shape[1]
        return [((wanted.exp() * (wanted - found)).sum(), torch.tensor(float(count), device=wanted.device))]


@dataclass(frozen=True)
class SquaredError:
    """Squared error as a share of the squares that are wanted, averaged over all outputs of floating point, however nested."""

    def kept(self, outputs: Any) -> list[Tensor]:
        """The outputs of floating point."""
        return _floats(outputs)

    def terms(self, found: Any, wanted: Any) -> Terms:
        """Squared errors, and squares."""
        _check_shapes(found, wanted)
        return [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in zip(found, wanted, strict=True)]


@dataclass(frozen=True)
class OwnDistance:
    """A function of the user's: `compare(outputs, wanted)`, differentiable, a mean over the samples of a batch."""

    compare: Callable[[Any, Any], Tensor]

    def kept(self, outputs: Any) -> Any:
        """All of them."""
        return outputs

    def terms(self, found: Any, wanted: Any) -> Terms:
        """What the function says, weighed by the samples of the batch."""
        value = self.compare(found, wanted)
        if not isinstance(value, Tensor) or value.numel() != 1:
            said = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"compare(outputs, wanted) must return one number as a tensor, it returned {said}")
        first = outputs_of(wanted)[0]
        count = torch.tensor(float(len(first) if first.dim() else 1), device=value.device)
        return [(value.reshape(()) * count, count)]


def mean_of(terms: Terms) -> Tensor:
    """One number: each quotient, averaged."""
    return torch.stack([above / below.clamp_min(1e-12) for above, below in terms]).mean()


def distance_between(distance: Distance, wanted: Sequence[Any], found: Sequence[Any]) -> float:
    """Over batches of what was kept of two networks."""
    with torch.no_grad():
        batches = [distance.terms(b, a) for a, b in zip(wanted, found, strict=True)]
        sums = [tuple(sum(float(term[k]) for term in own) for k in (0, 1)) for own in zip(*batches, strict=True)]
    return sum(above / max(below, 1e-12) for above, below in sums) / len(sums)


def tells_classes(network: fx.GraphModule | Any) -> bool:
    """Whether a network's output is (N, classes) of two classes or more, so that it looks like a classifier's.

    Args:
        network: The graph, whose first output is looked at; or outputs that it gave.
    """
    if not isinstance(network, fx.GraphModule):
        found = main_output(network)
        return found.dim() == 2 and found.shape[1] > 1
    graph = network
    node = next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes[0]
    shapes = shapes_of(node)
    return bool(shapes) and len(shapes[0]) == 2 and shapes[0][1] > 1


def default_distance(network: fx.GraphModule | Any) -> Distance:
    """Divergence of class probabilities where the output (of a graph, or given) looks like a classifier's, else squared error."""
    return ClassDivergence() if tells_classes(network) else SquaredError()


def _floats(outputs: Any) -> list[Tensor]:
    found = [x for x in outputs_of(outputs) if x.is_floating_point()]
    if not found:
        raise DataError("none of the network's outputs is a tensor of floating point: there is nothing to compare")
    return found


def _check_shapes(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    own, other = ([tuple(x.shape) for x in some] for some in (found, wanted))
    if own != other:
        raise DataError(f"the outputs changed their structure: shapes {own}, the original gives {other}")
