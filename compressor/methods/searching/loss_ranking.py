"""`LossRanking`: channels by what they lose for what they save, scaled and shifted by group: LeGR's genome, AACP's order."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from compressor.methods.base import Problem
from compressor.methods.losses.allocation import RANK_PRICES
from compressor.methods.losses.curves import curves_of, images_for_losses
from compressor.methods.structures.paths import Price, steepest
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.search_space import columns_within, ranks_of
from compressor.passes.criteria import Scores, select
from compressor.passes.fitting.losses import Curve
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.product import Product

SENSITIVITIES = (0.5, 0.0, 1.0)
"""Powers of a group's sensitivity in its losses: CaP's weightings, `mixed` first. Which is best depends on the budget."""

_POWER = "sensitivity"


class Genome(Protocol):
    """Scores from parameters."""

    groups: frozenset[str]
    """Groups that may be narrowed."""

    @property
    def space(self) -> dict[str, FloatDistribution]:
        """The parameters; their middle leaves the scores as they are."""

    @property
    def start(self) -> list[dict[str, float]]:
        """Parameters that are worth a try."""

    def scores(self, params: Mapping[str, Any]) -> dict[str, Scores]:
        """Group name -> score per unit."""


class LossRanking:
    """The logarithm of what each channel loses for what it saves, stretched around its group's mean and shifted.

    What it loses is the loss behind all layers that read it *after* compensation; what it saves is counted on the network
    from which CaP's allocation takes it.

    Args:
        problem: The network, with images without labels.
        settings: Of compensation.
        options: Legal widths of every group.
        price: Of structures, (structures, groups) to (structures,): what is to be saved.
        power: Of the sensitivities.
        probes: Images that these are measured on.
        groups: Whether channels may go, and not only ranks and branches.

    Raises:
        DataError: There are no images.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Compensation,
        options: Sequence[Sequence[int]],
        price: Price,
        power: float = SENSITIVITIES[0],
        probes: int = 256,
        groups: bool = True,
    ) -> None:
        channels, self._power = problem.channels, power
        curves = curves_of(problem, images_for_losses(problem), settings, probes, groups)
        self._base = self._computed(channels, curves, options, price, power)
        self._sensitivity = {name: float(np.log(_sensitivity(curves[name]))) for name in self._base}
        self._middle = {name: float(own.mean()) for name, own in self._base.items()}
        self.groups = frozenset(self._base)
        self._names = [group.name for group in channels.groups if group.name in self._base]

    @staticmethod
    def _computed(
        channels: ChannelGraph, curves: Mapping[str, Curve], options: Sequence[Sequence[int]], price: Price, power: float
    ) -> dict[str, Scores]:
        groups = dict(enumerate(channels.groups))
        legal = {k: list(options[k]) for k, group in groups.items() if group.name in curves and len(options[k]) > 1}
        losses = {}
        for k in legal:
            curve = curves[groups[k].name]
            dearer = RANK_PRICES[0] if isinstance(groups[k], RankAxis) else 1.0
            losses[k] = dearer * curve.ranking.loss[legal[k]] * _sensitivity(curve) ** power
        holds = columns_within(channels)
        path = steepest([g.size for g in channels.groups], legal, losses, price, holds)
        costs = price(path)
        saved = np.maximum(-np.diff(costs), 1e-8 * costs[0])
        prices: dict[str, NDArray[np.float64]] = {}
        highest = 0.0
        for before, after, gain in zip(path[:-1], path[1:], saved, strict=True):
            k = int(np.argmax(before != after))
            group, curve = groups[k], curves[groups[k].name]
            at = [legal[k].index(int(row[k])) for row in (before, after)]
            inner = [own for own in holds.get(k, ()) if own in legal]  # of a branch: what it had lost no longer counts
            spared = sum(float(losses[own][legal[own].index(int(before[own]))]) for own in inner)
            highest = max(highest, float(losses[k][at[1]] - losses[k][at[0]] - spared) / gain)  # in the order in which they go
            own = prices.setdefault(group.name, np.full(group.size, np.inf))
            stay, stayed = (set(select(group, curve.ranking.scores, int(row[k]))) for row in (after, before))
            own[sorted(stayed - stay)] = highest
        # what loses nothing is a little cheaper than what loses least: at a logarithm of -inf no mean could be taken
        least = min((float(own[own > 0].min()) for own in prices.values() if (own > 0).any()), default=1.0) / np.e
        return {name: _ordered(np.log(own.clip(least)), curves[name].ranking.scores) for name, own in prices.items()}

    @property
    def plain(self) -> dict[str, Scores]:
        """The scores as they are."""
        return self._base

    @property
    def space(self) -> dict[str, FloatDistribution]:
        """One unit of a sampler (an eighth of the range) is a factor of 1.3, one of 1.6 of the price, and a power of 1/4."""
        found = {_POWER: FloatDistribution(-1.0, 1.0)}
        for name in self._names:
            found[f"scale:{name}"] = FloatDistribution(float(np.exp(-2)) ** 0.5, float(np.exp(2)) ** 0.5, log=True)
            found[f"shift:{name}"] = FloatDistribution(-2.0, 2.0)
        return found

    def scores(self, params: Mapping[str, Any]) -> dict[str, Scores]:
        """See `Genome`."""
        scale = {name: params[f"scale:{name}"] for name in self._base}
        shift = {name: params[f"shift:{name}"] + params[_POWER] * self._sensitivity[name] for name in self._base}
        middle = self._middle
        return {name: (own - middle[name]) * scale[name] + middle[name] + shift[name] for name, own in self._base.items()}

    @property
    def start(self) -> list[dict[str, float]]:
        """The unchanged ranking, but for the other powers of the sensitivities."""
        middle = {name: 1.0 if d.log else 0.0 for name, d in self.space.items()}
        return [{**middle, _POWER: power - self._power} for power in SENSITIVITIES if power != self._power]


def _sensitivity(curve: Curve) -> float:
    return max(curve.sensitivity, 1e-12)


def singular_values(channels: ChannelGraph) -> dict[str, Scores]:
    """Of the layers whose ranks are searched, by the name of their axis, largest first."""
    found = {}
    for axis in ranks_of(channels):
        matrix = Product(channels.graph.get_submodule(axis.layer)).matrix()[0]
        found[axis.name] = np.asarray(torch.linalg.svdvals(matrix).cpu().numpy(), dtype=np.float64)
    return found


def _ordered(prices: NDArray[np.float64], scores: Scores) -> NDArray[np.float64]:
    """Finite prices, equal ones told apart by the ranking, so that no order is left to chance."""
    finite = np.isfinite(prices)
    highest = float(prices[finite].max()) if finite.any() else 0.0
    prices = np.where(finite, prices, highest + 1.0)
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    return np.asarray(prices + 1e-9 * rank, dtype=np.float64)
