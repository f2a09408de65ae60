"""L1 norm of a filter (Li et al., "Pruning Filters for Efficient ConvNets", 2017)."""

from dataclasses import dataclass

from torch import Tensor

from compressor.passes.criteria.base import FilterCriterion, Scoring
from compressor.passes.labels.labeler import Slot


@dataclass(frozen=True)
class L1(FilterCriterion):
    """Sum of absolute weights: sum |w|."""

    def of_filters(self, scoring: Scoring, slot: Slot) -> Tensor:
        """Score per label of one slot."""
        return scoring.rows(slot).abs().sum(1)
