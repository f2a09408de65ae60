"""How far each layer is compressed: CC's global compression rate optimization.

The loss of a layer at rate c (the share of its MACs that is saved) is fitted by p1 exp(p2 c), and

    minimise sum F_l p1_l exp(p2_l c_l)   subject to   sum F_l c_l = what is to be saved
    =>  c_l = ln(x / (p1_l p2_l)) / p2_l,  clipped to [0, 0.95]

where F_l are the layer's MACs and x the Lagrange multiplier. The released code looks for x by a million steps of gradient descent;
here a budget of any kind is met by bisection, on the costs of the network that really comes out.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.methods.layers.cc_removal import State, cheapest_first

Array = NDArray[np.float64]

_LEAST = 1e-10  # added to losses before their logarithm is taken, as published
_LEAST_SLOPE = 1e-3


def fitted(path: Sequence[State]) -> tuple[float, float]:
    """p1 and p2 of a sensitivity curve: least squares of ln(loss) on the rate, squares weighted by sqrt(loss).

    Losses are relative to the largest.

    Args:
        path: From the whole layer down; states that save nothing do not count.
    """
    whole = path[0].elements
    points = np.array([(1 - s.elements / whole, s.loss) for s in path if s.elements < whole])
    if len(points) < 2 or points[:, 1].max() <= 0:
        return _LEAST, 1.0
    losses = points[:, 1].clip(0) / points[:, 1].max()
    weights = (losses + _LEAST) ** 0.25  # `polyfit` squares them
    slope, offset = np.polyfit(points[:, 0], np.log(losses + _LEAST), 1, w=weights)
    return float(np.exp(offset)), max(float(slope), _LEAST_SLOPE)


class Exponential:
    """As published.

    Args:
        curves: Layer -> p1, p2.
        paths: Layer -> its states, from the whole one down.
        most: The largest rate; 0.95 as published.
    """

    def __init__(self, curves: Mapping[str, tuple[float, float]], paths: Mapping[str, Sequence[State]], most: float = 0.95) -> None:
        self._most = most
        self._paths = {name: list(cheapest_first(list(path))) for name, path in paths.items()}
        self._p1, self._p2 = (np.array([curves[name][k] for name in self._paths]) for k in (0, 1))
        price = np.log(self._p1 * self._p2)
        self._low, self._high = float(price.min()), float((price + most * self._p2).max())

    def rates(self, level: float) -> Array:
        """(layers,): the share of MACs that each saves."""
        x = self._low + level * (self._high - self._low)  # of ln x
        return np.asarray(((x - np.log(self._p1 * self._p2)) / self._p2).clip(0, self._most))

    def __call__(self, level: float) -> dict[str, State]:
        """The first state of each layer that saves as much."""
        found = {}
        for (name, path), rate in zip(self._paths.items(), self.rates(level), strict=True):
            goal = (1 - rate) * path[0].elements
            found[name] = next((state for state in path if state.elements <= goal * (1 + 1e-12)), path[-1])
        return found
