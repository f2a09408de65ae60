"""Samplers: ours, and Optuna's as rivals, one line each in `RIVALS`."""

from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler

from compressor.search.samplers.aacp import AACPSampler
from compressor.search.samplers.base import ABANDONED, Past, PopulationSampler, index_of
from compressor.search.samplers.legr import LeGRSampler

RIVALS: dict[str, Callable[[int], BaseSampler]] = {
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "nsgaii": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
}
"""Optuna's samplers, from a seed."""

__all__ = ["ABANDONED", "RIVALS", "AACPSampler", "LeGRSampler", "Past", "PopulationSampler", "index_of"]
