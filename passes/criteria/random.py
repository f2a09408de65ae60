"""Random scores: the baseline that every criterion has to beat."""

import zlib
from dataclasses import dataclass

import numpy as np

from compressor.passes.criteria.base import Scores, Scoring
from compressor.passes.labels.groups import ChannelGroup


@dataclass(frozen=True)
class Random:
    """Uniform scores, fixed by the seed and the name of the group.

    Attributes:
        seed: The seed.
    """

    seed: int = 0

    def __call__(self, scoring: Scoring, group: ChannelGroup) -> Scores:
        """See `Criterion`."""
        del scoring
        return np.random.default_rng([self.seed, zlib.crc32(group.name.encode())]).random(group.size)
