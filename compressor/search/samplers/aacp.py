"""`AACPSampler`: the improved differential evolution of AACP.

Lin et al., "AACP: Model Compression by Accurate and Automatic Channel Pruning", ICPR 2022, and its released code
(`linlb11/AACP`), with the constants of the latter as defaults: DE/best/1/bin over the structure vector, rounded to the
pruning steps, repaired to the budgets, members that have not improved for `max_stay` turns drawn anew.

Where this differs from the released code: mutants are rounded, but repaired only after the crossover; the best is that of
the whole first population, not of its first member (which the code copies); the repair is given from outside, so that it
may know any budget; and numbers of uneven steps are rounded to the nearest, not cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from compressor.search.samplers.base import Past, PopulationSampler, fitting
from compressor.search.samplers.coordinates import Axis

MEMBER = "aacp:member"
"""System attribute: `[member, kind]`, the kind being `first`, `trial` or `restart`."""

_STEP = 1 / 32  # of the range of a parameter that has no steps

Repair = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
Fresh = Callable[[np.random.Generator], dict[str, Any]]
Allowed = Callable[[Sequence[Mapping[str, Any]]], NDArray[np.bool_]]


@dataclass
class _Population:
    """Members as the finished trials have made them."""

    genes: dict[int, FrozenTrial] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    stay: dict[int, int] = field(default_factory=dict)
    best: FrozenTrial | None = None


class AACPSampler(PopulationSampler):
    """Differential evolution: every member in its turn is crossed with the best, moved by the difference of two others.

    Args:
        seed: Of everything random.
        population: Members (NP).
        factor: Of the difference (F).
        crossover: Probability that a parameter comes from the mutant (CR).
        max_stay: Turns without improvement after which a member is drawn anew.
        repair: Moves parameters into the feasible region; it may draw from the generator that it is given.
        fresh: Draws a member anew, where something is known about good ones; without it every parameter is drawn for itself.
        allowed: Which parameters are feasible by what is known now, where that changes as the search goes on: a candidate that has
            turned out not to be is not the best, and any that is takes its place.
        start: Members of the first population, where some are known to be good; the others are drawn.
        lag: See `PopulationSampler`.
        space: See there; without it the first trials are drawn parameter by parameter and not repaired.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        seed: int | None = None,
        population: int = 10,
        factor: float = 0.5,
        crossover: float = 0.8,
        max_stay: int = 4,
        repair: Repair | None = None,
        start: Sequence[Mapping[str, Any]] = (),
        lag: int = 1,
        space: Mapping[str, BaseDistribution] | None = None,
        allowed: Allowed | None = None,
        fresh: Fresh | None = None,
    ) -> None:
        super().__init__(seed, lag, space)
        if population < 4 or factor <= 0 or not 0 <= crossover <= 1 or max_stay < 1:
            raise ValueError("AACPSampler: at least 4 members, factor and max_stay positive, crossover in [0, 1]")
        self._population, self._factor, self._crossover, self._max_stay = population, factor, crossover, max_stay
        self._repair, self._start, self._allowed, self._fresh = repair, tuple(start), allowed, fresh

    def draw(self, past: Past, space: Mapping[str, BaseDistribution], again: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `PopulationSampler`; drawn again, as many parameters as that are moved besides, by at most so many steps."""
        population = self._replayed(past, space)
        member, kind = self._turn(past, population)
        random = self.random(past.index, again=again)
        others = [k for k in population.genes if k != member]
        if kind == "trial" and member in population.genes and len(others) >= 2 and population.best is not None:
            params = self._crossed(random, population, member, others, space)
        elif kind == "first" and member < len(self._start):
            params = {name: self._start[member][name] for name in space}
        elif kind == "restart" and self._fresh is not None:
            params = self._fresh(random)
        else:
            params = self.first(past.index, space, again)
        for name in random.permutation(list(space))[:again]:
            params[name] = self._stepped(random, Axis(space[name]), params[name], again)
        if self._repair is not None:
            params = self._repair(params, random)
        return params, {MEMBER: [member, kind]}

    def _replayed(self, past: Past, space: Mapping[str, BaseDistribution]) -> _Population:
        """The population after the trials that may be looked at."""
        found = _Population()
        trials = fitting(past.finished, space)
        losses = np.array([past.loss(trial) for trial in trials])
        if self._allowed is not None and trials:
            allowed = self._allowed([trial.params for trial in trials])
            losses = np.where(allowed, losses, np.inf) if (allowed & np.isfinite(losses)).any() else losses
        for trial, loss in zip(trials, losses.tolist(), strict=True):
            if np.isfinite(loss) and (found.best is None or loss < past.loss(found.best)):
                found.best = trial
            if MEMBER not in trial.system_attrs:
                continue  # of another sampler, or put in by hand: it may be the best, but is no member
            member, kind = trial.system_attrs[MEMBER]
            if kind != "trial" or loss < found.losses.get(member, np.inf):
                found.stay[member] = 0
                found.losses[member] = loss
                if np.isfinite(past.loss(trial)):
                    found.genes[member] = trial
            else:
                found.stay[member] = found.stay.get(member, 0) + 1
        return found

    def _turn(self, past: Past, population: _Population) -> tuple[int, str]:
        """Whose turn it is, from what has begun."""
        tags = [t.system_attrs[MEMBER] for t in past.begun if MEMBER in t.system_attrs]
        if len(tags) < self._population:
            return len(tags), "first"
        member, kind = tags[-1]
        if kind == "restart":
            return member, "trial"
        member = (member + 1) % self._population
        known = {t.number for t in past.finished}
        waiting = any(t.system_attrs.get(MEMBER) == [member, "restart"] and t.number not in known for t in past.begun[-self._lag :])
        return member, "restart" if population.stay.get(member, 0) >= self._max_stay and not waiting else "trial"

    def _crossed(
        self,
        random: np.random.Generator,
        population: _Population,
        member: int,
        others: list[int],
        space: Mapping[str, BaseDistribution],
    ) -> dict[str, Any]:
        assert population.best is not None
        two, three = (population.genes[others[k]].params for k in random.choice(len(others), 2, replace=False))
        sure = int(random.integers(len(space)))  # at least one comes from the mutant
        params = {}
        for k, (name, distribution) in enumerate(space.items()):
            mutant = self._mutant(random, Axis(distribution), population.best.params[name], two[name], three[name])
            taken = bool(random.random() <= self._crossover) or k == sure
            params[name] = mutant if taken else population.genes[member].params[name]
        return params

    def _stepped(self, random: np.random.Generator, axis: Axis, value: Any, most: int) -> Any:
        if axis.categorical:
            return axis.uniform(random)
        step = axis.step if axis.integer and not axis.log else axis.span * _STEP
        return axis.value(axis.to(value) + step * int(random.integers(1, most + 1)) * (1 if random.random() < 0.5 else -1))

    def _mutant(self, random: np.random.Generator, axis: Axis, best: Any, two: Any, three: Any) -> Any:
        """DE/best/1: best + F (x2 - x3); widths are cut to whole channels and rounded to the step, as in the released code."""
        if axis.categorical:
            return best if two == three else axis.uniform(random)
        moved = axis.to(best) + self._factor * (axis.to(two) - axis.to(three))
        return axis.value(float(int(moved)) if axis.step > 1 else moved)
