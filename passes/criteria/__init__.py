"""Importance of channels: one criterion per file, one line each in `CRITERIA`.

Imports `labels`.
"""

from typing import Any

from compressor.passes.criteria.base import Criterion, FilterCriterion, Scores, Scoring, select
from compressor.passes.criteria.batchnorm_scale import BatchNormScale
from compressor.passes.criteria.geometric_median import GeometricMedian
from compressor.passes.criteria.l1 import L1
from compressor.passes.criteria.l2 import L2
from compressor.passes.criteria.random import Random
from compressor.passes.criteria.taylor import Taylor

CRITERIA: dict[str, Any] = {
    "l1": L1,
    "l2": L2,
    "taylor": Taylor,
    "batchnorm-scale": BatchNormScale,
    "geometric-median": GeometricMedian,
    "random": Random,
}

__all__ = ["CRITERIA", "Criterion", "FilterCriterion", "Scores", "Scoring", "select"]
