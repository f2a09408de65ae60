"""What our samplers have in common: what they draw follows from the seed and the trials before, and from nothing else.

A sampler keeps no state. The number of a trial (not counting *abandoned* ones, which a killed process left unfinished)
seeds its generator, and the population is read from the study. So a search that was killed goes on as if it had not
been, wherever it is stored, and several processes can work on one study.

With `lag` trials under way at once, a trial looks only at those that began at least `lag` before it, whichever
finish first: the same seed and lag give the same search on one machine and on a cluster.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from compressor.search.samplers.coordinates import Axis

ABANDONED = "compressor:abandoned"
"""System attribute of trials that a killed process left; they are as if they had never been."""


@dataclass(frozen=True)
class Past:
    """What a trial may know.

    Attributes:
        index: How many trials began before it.
        begun: All of these, in order.
        finished: Those that it may look at: finished, well or not, and at least `lag` before it.
        sign: 1 where smaller values are better, -1 where larger ones are.
    """

    index: int
    begun: tuple[FrozenTrial, ...]
    finished: tuple[FrozenTrial, ...]
    sign: int

    def loss(self, trial: FrozenTrial) -> float:
        """Its value, smaller is better; infinite for one that failed."""
        return self.sign * float(trial.value) if trial.state == TrialState.COMPLETE and trial.value is not None else np.inf


def index_of(trials: Sequence[FrozenTrial], number: int) -> int:
    """How many trials began before the one of that number, abandoned ones not counted."""
    return sum(1 for t in trials if t.number < number and ABANDONED not in t.system_attrs)


class PopulationSampler(BaseSampler):
    """Base class: a subclass says what it draws in `draw`.

    Args:
        seed: Of everything random; drawn where it is left out.
        lag: How many trials are under way at once.
        space: The search space, where it is known beforehand; otherwise it is what the finished trials have in common.

    Raises:
        ValueError: `lag` is not positive.
    """

    def __init__(self, seed: int | None = None, lag: int = 1, space: Mapping[str, BaseDistribution] | None = None) -> None:
        if lag < 1:
            raise ValueError(f"lag must be at least 1, found {lag}")
        self._seed = int(np.random.default_rng().integers(2**62)) if seed is None else seed
        self._lag = lag
        self._space = dict(space) if space is not None else None
        self._intersection = IntersectionSearchSpace()

    def draw(self, past: Past, space: Mapping[str, BaseDistribution], again: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters of the next trial, and what the sampler has to remember about it (a system attribute each).

        Args:
            past: What it may know.
            space: Parameter name -> distribution.
            again: How often it was drawn before in vain, as nothing would be learnt from it: the larger, the farther from that.
        """
        raise NotImplementedError

    def initial(self, random: np.random.Generator, axis: Axis) -> Any:
        """A parameter of an individual of the first population; uniform unless a subclass says otherwise."""
        return axis.uniform(random)

    def past(self, study: Study, number: int, trials: Sequence[FrozenTrial] | None = None) -> Past:
        """What the trial of that number may know, from the study's trials where these are at hand."""
        everything = study.get_trials(deepcopy=False) if trials is None else trials
        begun = tuple(t for t in everything if t.number < number and ABANDONED not in t.system_attrs)
        seen = begun[: max(len(begun) + 1 - self._lag, 0)]
        finished = tuple(t for t in seen if t.state in (TrialState.COMPLETE, TrialState.FAIL))
        return Past(len(begun), begun, finished, -1 if study.direction == StudyDirection.MAXIMIZE else 1)

    def random(self, index: int, name: str = "", again: int = 0) -> np.random.Generator:
        """The generator of a trial, or of one of its parameters."""
        return np.random.default_rng([self._seed, index, zlib.crc32(name.encode()), *([again] if again else [])])

    def first(self, index: int, space: Mapping[str, BaseDistribution], again: int = 0) -> dict[str, Any]:
        """An individual of the first population."""
        return {name: self.initial(self.random(index, name, again), Axis(d)) for name, d in space.items()}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that are drawn together."""
        del trial
        self._raise_error_if_multi_objective(study)
        if self._space is not None:
            return self._space
        return {name: d for name, d in self._intersection.calculate(study).items() if not d.single()}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Draw them."""
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        params, attributes = self.draw(self.past(study, trial.number), search_space)
        for key, value in attributes.items():
            study._storage.set_trial_system_attr(trial._trial_id, key, value)
        return params

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Draw a parameter that is not known beforehand, as for the first population."""
        self._raise_error_if_multi_objective(study)
        index = index_of(study.get_trials(deepcopy=False), trial.number)
        return self.initial(self.random(index, param_name), Axis(param_distribution))


def fitting(trials: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution]) -> list[FrozenTrial]:
    """The trials that have every parameter of a space."""
    return [t for t in trials if all(t.distributions.get(name) == d for name, d in space.items())]
