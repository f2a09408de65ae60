"""First-order Taylor expansion of the loss (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019)."""

from dataclasses import dataclass

from torch import Tensor

from compressor.passes.criteria.base import FilterCriterion, Scoring
from compressor.passes.labels.labeler import Slot


@dataclass(frozen=True)
class Taylor(FilterCriterion):
    """Squared first-order change of the loss when a filter is set to zero: (sum w g)^2 (eq. 8 there).

    Needs `Scoring.gradients`.
    """

    def of_filters(self, scoring: Scoring, slot: Slot) -> Tensor:
        """Score per label of one slot."""
        return (scoring.rows(slot) * scoring.gradient_rows(slot)).sum(1).square()
