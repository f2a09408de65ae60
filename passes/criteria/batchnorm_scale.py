"""Scale of the batch norm behind a filter (Liu et al., "Network Slimming", 2017)."""

from dataclasses import dataclass

from torch import Tensor

from compressor.passes.criteria.base import FilterCriterion, Scoring
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.labels.labeler import Slot


@dataclass(frozen=True)
class BatchNormScale(FilterCriterion):
    """Absolute scale |gamma|; a group that no norm scales is ranked by the L2 norm of its filters instead."""

    def slots(self, scoring: Scoring, group: ChannelGroup) -> list[Slot]:
        """The norms' weights, where there are any."""
        return scoring.scales(group) or scoring.filters(group)

    def of_filters(self, scoring: Scoring, slot: Slot) -> Tensor:
        """Score per label of one slot."""
        return scoring.rows(slot).square().sum(1).sqrt()
