"""`Factorize`: layers become sequences in one form, nothing else: the plain baseline of factorization.

All layers are compressed equally hard, by one number that is bisected until the budget is met: the share of energy that
is kept, the share of its MACs that a layer may cost, or how far ranks go from the full ones towards those of variational Bayes
(`rank_choice.py`). A layer whose sequence would cost more stays as it is; the first and the linear layers are left alone.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from compressor.errors import BudgetError
from compressor.methods.base import MethodSettings, Problem
from compressor.methods.layers.unit_plans import UnitPlans
from compressor.methods.structures.bisect_level import least_accepted
from compressor.methods.structures.slower_sequences import refused
from compressor.passes.channels.layer_costs import Layer
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.factorizable import blocks_of, factorizable, sizes_of
from compressor.passes.layers.forms import FORMS, Sizes
from compressor.passes.layers.rank_choice import by_energy, by_rate, by_vbmf, spectra
from compressor.runtime.latency_model.single_layers import rank_edges
from compressor.values.plan import Factorization, Plan
from compressor.values.settings import check


@dataclass(frozen=True)
class Factorize(MethodSettings):
    """Factorize layers in one form.

    Attributes:
        form: `svd`, `spatial_svd`, `tucker2`, `cp` or `tensor_train`.
        choice: Of ranks: `rate`, `energy`, `vbmf`, or `fixed`.
        rank: Where the choice is `fixed`: this one, or less where a layer has no such rank.
        steps: Ranks are multiples of the target's `align`, or right edges of each layer's measured `staircase` (forms of
            one rank).
        accept: Whether layers have to be faster on the target to stay factorized; `None`: where the budget is a latency.
        compensation: How the network is repaired, with the truncation that loses least of the output; None for not at all.

    Raises:
        BudgetError: A setting is none of these.
    """

    name: ClassVar[str] = "factorize"
    form: str = "svd"
    choice: Literal["rate", "energy", "vbmf", "fixed"] = "energy"
    rank: int | None = None
    steps: Literal["align", "staircase"] = "align"
    accept: bool | None = None
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, known={"form": FORMS})
        if (self.rank is None) == (self.choice == "fixed") or (self.rank is not None and self.rank < 1):
            raise BudgetError(f"Factorize(choice={self.choice!r}, rank={self.rank}): a positive rank goes with choice='fixed'")
        if self.form == "cp" and self.choice in ("energy", "vbmf"):
            raise BudgetError("Factorize: the terms of `cp` are not the rank of a matrix: choose ranks by `rate`, or `fixed`")

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return True

    def plan(self, problem: Problem) -> Plan:
        """Decide which layers become sequences, and their ranks.

        Raises:
            BudgetError: The budget cannot be met; the closest that can is said.
        """
        ranks = _Ranks(problem, self)
        plain: frozenset[str] = frozenset()
        slower = partial(refused, problem, accept=self.accept)
        while True:  # every round, at least one layer more is left plain
            plan, slow = least_accepted(problem, partial(ranks.plan, plain), " by factorization alone: as far as it goes", slower)
            if not slow:
                return plan
            plain |= slow


class _Ranks:
    """Ranks of all layers at a level from 0 (full) to 1 (as low as the choice goes)."""

    def __init__(self, problem: Problem, method: Factorize) -> None:
        self._problem, self._method, self._form = problem, method, FORMS[method.form]
        graph = problem.channels.graph
        reasons = UnitPlans(problem.channels).layers
        able = factorizable(graph, self._form)
        self._layers: dict[str, tuple[Sizes, list[np.ndarray]]] = {}
        for name, reason in reasons.items():
            grouped = reason == "it is a grouped convolution"
            if (reason is None or grouped) and able.get(name, "") is None:
                layer = graph.get_submodule(name)
                self._layers[name] = sizes_of(layer), list(blocks_of(layer))
        if not self._layers:
            why = "; ".join(f"{name}: {reason or able[name]}" for name, reason in list(reasons.items())[:5])
            why = why or "it has no convolution"
            raise BudgetError(f"no layer of this network can be factorized as {method.form} ({why})")
        self._costs = {name: Layer.of(problem.channels, name) for name in self._layers}
        own = self._layers.items()
        self._vbmf = {name: by_vbmf(self._form, blocks) for name, (_, blocks) in own} if method.choice == "vbmf" else {}
        self._energies = {name: spectra(self._form, blocks) for name, (_, blocks) in own} if method.choice == "energy" else {}

    def plan(self, plain: frozenset[str], level: float) -> Plan:
        """The plan at a level, without some layers."""
        factors = []
        for name, (sizes, blocks) in self._layers.items():
            ranks = None if name in plain else self._of(name, level)
            if ranks is not None:
                ranks = self._stepped(name, sizes, ranks)
                if self._costs[name].saves(len(blocks), sizes, self._form.stages(sizes, ranks)):
                    factors.append(Factorization(name, self._form.name, ranks))
        return Plan.keep({}, self._problem.channels.digest, factors=factors)

    def _of(self, name: str, level: float) -> tuple[int, ...] | None:
        sizes, blocks = self._layers[name]
        full = self._form.full(sizes)
        match self._method.choice:
            case "fixed":
                return tuple(min(self._method.rank or 1, most) for most in full)
            case "energy":
                return by_energy(self._energies[name], 1.0 - level)
            case "vbmf":
                least = self._vbmf[name] or full
                return tuple(round(most - level * (most - low)) for most, low in zip(full, least, strict=True))
        layer, count = self._costs[name], len(blocks)
        dense = layer.dense(count, sizes).macs
        share = by_rate(self._form, sizes, 1.0 - level, lambda stages: layer.factorized(count, sizes, stages).macs / dense)
        return share or (1,) * len(full)

    def _stepped(self, name: str, sizes: Sizes, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Rounded up to the steps of the target."""
        full, align = self._form.full(sizes), self._problem.target.align
        if self._method.steps == "staircase" and len(full) == 1:
            problem = self._problem
            edges = rank_edges(problem.channels, name, self._form.name, full[0], align, problem.target, problem.once, problem.seed)
            return (next((edge for edge in edges if edge >= ranks[0]), full[0]),)
        return tuple(min(-(-rank // align) * align, most) if rank > align else rank for rank, most in zip(ranks, full, strict=True))
