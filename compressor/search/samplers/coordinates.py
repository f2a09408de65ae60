"""Parameters of any Optuna distribution as numbers that can be mutated and subtracted."""

import math
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution


class Axis:
    """One parameter. Its coordinate is its value, or the logarithm of it where the distribution is a logarithmic one.

    Args:
        distribution: Of the parameter.
    """

    def __init__(self, distribution: BaseDistribution) -> None:
        self.distribution = distribution
        self.categorical = isinstance(distribution, CategoricalDistribution)
        self.integer = isinstance(distribution, IntDistribution)
        self.step = float(getattr(distribution, "step", None) or 0.0) if self.integer else 0.0
        self.log = not self.categorical and bool(getattr(distribution, "log", False))
        if isinstance(distribution, FloatDistribution | IntDistribution):
            self.low, self.high = self.to(distribution.low), self.to(distribution.high)

    @property
    def span(self) -> float:
        """Length of the range."""
        return self.high - self.low

    @property
    def center(self) -> float:
        """Middle of the range."""
        return 0.5 * (self.low + self.high)

    def to(self, value: Any) -> float:
        """Coordinate of a value."""
        return math.log(value) if self.log else float(value)

    def value(self, coordinate: float) -> Any:
        """The value nearest to a coordinate."""
        d = self.distribution
        assert isinstance(d, FloatDistribution | IntDistribution)
        x = math.exp(min(max(coordinate, self.low), self.high)) if self.log else float(coordinate)
        if d.step is not None and not self.log:
            steps = math.floor((d.high - d.low) / d.step + 1e-9)
            first = d.low / d.step  # halves go to even multiples of the step where all values are multiples
            x = d.low + d.step * min(max(round(x / d.step - first % 1) - math.floor(first), 0), steps)
        x = min(max(x, d.low), d.high)
        return round(x) if self.integer else float(x)

    def uniform(self, random: np.random.Generator) -> Any:
        """A value drawn uniformly from the range, or from the values where these can be counted."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return d.choices[int(random.integers(len(d.choices)))]
        assert isinstance(d, FloatDistribution | IntDistribution)
        if d.step is not None and not self.log:
            steps = math.floor((d.high - d.low) / d.step + 1e-9)
            x = d.low + d.step * int(random.integers(steps + 1))
            return int(x) if self.integer else min(float(x), d.high)
        return self.value(self.low + self.span * random.random())
