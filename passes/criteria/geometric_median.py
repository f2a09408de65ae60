"""Distance to the geometric median (He et al., "Filter Pruning via Geometric Median", FPGM, 2019)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.passes.criteria.base import FilterCriterion, Scoring
from compressor.passes.labels.labeler import Slot


@dataclass(frozen=True)
class GeometricMedian(FilterCriterion):
    """Sum of the distances to all other filters of the layer (eq. 6 there): low = the others can replace it."""

    def of_filters(self, scoring: Scoring, slot: Slot) -> Tensor:
        """Score per label of one slot."""
        rows = scoring.rows(slot).double()  # |a-b|^2 = a^2 - 2ab + b^2 cancels badly in float32
        return torch.cdist(rows, rows).sum(1)
