"""`LeGRSampler`: the regularised (aging) evolution of LeGR.

Chin et al., "Towards Efficient Model Compression via Learned Global Ranking", CVPR 2020, and its released code
(`cmu-enyac/LeGR`), with the constants of the latter as defaults. For parameters of any kind: those of a logarithmic
range are *scales*, which are multiplied by exp(N(0, sigma)), others are *shifts*, to which N(0, 1) is added; an eighth of the
range is the unit of both, and its middle stands for the identity.

Where this differs from the released code: ranges end four units from the middle, and a trial that failed takes no place in
the population.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from compressor.search.samplers.base import Past, PopulationSampler, fitting
from compressor.search.samplers.coordinates import Axis

_UNITS = 8.0  # a range is that many units long


class LeGRSampler(PopulationSampler):
    """Aging evolution: a parent is the best of a few drawn from the latest trials, some of its parameters are mutated.

    Parameters whose names are the same behind the first colon (`scale:conv1` and `shift:conv1`) are mutated together.

    Args:
        seed: Of everything random.
        population: How many of the latest trials are the population (P).
        samples: How many are drawn from it, with replacement, to choose the parent among (S).
        generations: How many trials there will be (E): noise of scales falls linearly to a fifth over them.
        sigma: Standard deviation of the logarithm of a scale, in units.
        mutate: Share of the parameters that are drawn to be mutated, with replacement (u).
        identity: Which trial is the identity: that of index `population - 1` (None, as published), or another.
        lag: See `PopulationSampler`.
        space: See there.
        start: Members of the first population, where some are known to be good; the others are drawn.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        seed: int | None = None,
        population: int = 64,
        samples: int = 16,
        generations: int = 400,
        sigma: float = 1.0,
        mutate: float = 0.1,
        identity: int | None = None,
        lag: int = 1,
        space: Mapping[str, BaseDistribution] | None = None,
        start: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(seed, lag, space)
        if population < 1 or samples < 1 or generations < 1 or sigma <= 0 or not 0 < mutate <= 1:
            raise ValueError("LeGRSampler: population, samples, generations and sigma must be positive, mutate in (0, 1]")
        self._population, self._samples, self._generations = population, samples, generations
        self._sigma, self._mutate = sigma, mutate
        self._identity = population - 1 if identity is None else identity
        self._start = tuple(start)

    def initial(self, random: np.random.Generator, axis: Axis) -> Any:
        """The middle of the range plus noise."""
        if axis.categorical:
            return axis.uniform(random)
        return axis.value(axis.center + self._noise(random, axis, 1.0))

    def draw(self, past: Past, space: Mapping[str, BaseDistribution], again: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `PopulationSampler`; drawn again, more parameters are mutated, of another parent."""
        good = [t for t in fitting(past.finished, space) if t.state == TrialState.COMPLETE]
        if past.index == self._identity and not again:
            random = self.random(past.index)
            return {n: a.uniform(random) if a.categorical else a.value(a.center) for n, a in axes_of(space).items()}, {}
        if past.index < min(len(self._start), self._population) and not again:
            return {name: self._start[past.index][name] for name in space}, {}
        if past.index < self._population or not good:
            return self.first(past.index, space, again), {}
        random = self.random(past.index, again=again)
        pool = good[-self._population :]
        parent = min((pool[k] for k in random.choice(len(pool), self._samples)), key=past.loss)
        return self._mutated(random, parent, space, past.index, 1 + again), {}

    def _mutated(
        self, random: np.random.Generator, parent: FrozenTrial, space: Mapping[str, BaseDistribution], index: int, times: int
    ) -> dict[str, Any]:
        together = sorted({key_of(name) for name in space})
        drawn = random.choice(len(together), times * max(int(self._mutate * len(together)), 1))
        keys = {together[k] for k in drawn}
        annealed = max(1 - index / (1.25 * self._generations), 0.2)
        params = {}
        for name, axis in axes_of(space).items():
            value = parent.params[name]
            if key_of(name) in keys:
                value = axis.uniform(random) if axis.categorical else self._moved(random, axis, value, annealed)
            params[name] = value
        return params

    def _moved(self, random: np.random.Generator, axis: Axis, value: Any, annealed: float) -> Any:
        return axis.value(axis.to(value) + self._noise(random, axis, annealed))

    def _noise(self, random: np.random.Generator, axis: Axis, annealed: float) -> float:
        deviation = self._sigma * annealed if axis.log else 1.0  # the noise of shifts is not annealed in the released code
        return float(random.normal(0.0, deviation)) * axis.span / _UNITS


def axes_of(space: Mapping[str, BaseDistribution]) -> dict[str, Axis]:
    """The axes of a space."""
    return {name: Axis(distribution) for name, distribution in space.items()}


def key_of(name: str) -> str:
    """What a parameter belongs to: the part behind the first colon."""
    return name.partition(":")[2] or name
