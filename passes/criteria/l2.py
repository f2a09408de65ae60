"""L2 norm of a filter."""

from dataclasses import dataclass

from torch import Tensor

from compressor.passes.criteria.base import FilterCriterion, Scoring
from compressor.passes.labels.labeler import Slot


@dataclass(frozen=True)
class L2(FilterCriterion):
    """Euclidean norm of the weights: sqrt(sum w^2)."""

    def of_filters(self, scoring: Scoring, slot: Slot) -> Tensor:
        """Score per label of one slot."""
        return scoring.rows(slot).square().sum(1).sqrt()
