"""Coefficients of losses, searched on the repaired network.

Losses do not add up: two neighbours that are gone cost more than the sum of each alone, and a layer that is repaired makes up for
others. So every group, rank and branch gets a coefficient that its loss is multiplied by; the allocation is solved anew for each
set of coefficients, and the network that comes out is repaired and looked at (Frantar and Alistarh, "SPDY", ICML 2022, search
theirs so, for sparsities of layers). Only these few numbers are searched; what is within the budget is the allocation's work.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from compressor.methods.losses.allocation import Weighting

_SHARE = 0.3  # of the coefficients that are drawn anew at once
_SPREAD = 0.7  # standard deviation of the logarithm of their factor
_TRIES = 4  # draws for each network that is looked at: many lead to a network that is known


def with_coefficients(
    start: Weighting, names: Sequence[str], judged: Callable[[Weighting], float | None], networks: int, seed: int
) -> Weighting:
    """The weighting whose network is the nearest found: some coefficients of the best are drawn anew, again and again.

    Args:
        start: The one that is begun with.
        names: What may get a coefficient.
        judged: How far a weighting's network is from the original; None where it is a network that is known, or there is none.
        networks: How many are looked at besides.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    best, distance = start, judged(start)
    for _ in range(_TRIES * networks):
        if not networks:
            break
        drawn, found = random.random(len(names)) < _SHARE, dict(best.coefficients)
        for name in np.array(names)[drawn].tolist():
            found[name] = found.get(name, 1.0) * float(np.exp(_SPREAD * random.normal()))
        tried = replace(best, coefficients=tuple(sorted(found.items())))
        value = judged(tried)
        if value is None:
            continue
        networks -= 1
        if distance is None or value < distance:
            best, distance = tried, value
    return best
