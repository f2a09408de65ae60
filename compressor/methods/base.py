"""What a compression method is given, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.search_space import SearchSpace
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import Distance, default_distance
from compressor.runtime.latency_model.model import Observation
from compressor.runtime.latency_model.single_layers import Choice
from compressor.tasks.samples import Batches
from compressor.values.plan import Plan, Structure
from compressor.values.progress import Progress
from compressor.values.target import Target
from compressor.values.trial import Trial

Space: TypeAlias = Literal["channels", "ranks", "depth", "channels+ranks", "channels+depth", "ranks+depth", "channels+ranks+depth"]
"""What may go: channels, ranks of layers that become sequences, and branches as a whole."""


@dataclass(frozen=True)
class Problem:
    """What a method is given.

    Attributes:
        channels: The analysed graph of the original network.
        limits: Upper bounds, those that are asked for: `latency` as a fraction of the original's (so that it is
            compared within one session), `macs`, `params`, `memory` in bytes.
        target: For the widths that it likes.
        measure: Builds and times the network of a plan beside the original; results are kept by the run.
        train: Training data with its task, for methods that need gradients.
        seed: For whatever is random.
        validate: A hold-out of the training data with its task, for methods that look at the metric.
        calibration: Images without labels, for statistics; None where there are none.
        progress: Where to say what is being done.
        storage: URL that the trials of a search are kept at (any of Optuna's); None for memory.
        alone: Whether no other process writes to it.
        cluster: Ray cluster that trials run on: `auto` or `ray://…`; None for this process.
        observe: Builds and measures structures for a latency model, where that is not to be done in this process; takes the
            latency of the original that ratios are multiplied by.
        once: Calls a function and keeps what it returns (plain data) under a name, so that it is not computed again.
        distance: How outputs are compared with the original's; by what they look like if None.
        compared: Takes what was measured of factorized layers beside the plain ones, for the result.
    """

    channels: ChannelGraph
    limits: Mapping[str, float]
    target: Target
    measure: Callable[[Plan], Trial]
    train: Batches | None
    seed: int
    validate: Batches = ()
    calibration: Calibration | None = None
    progress: Progress = field(default_factory=Progress)
    storage: str | None = None
    alone: bool = False
    cluster: str | None = None
    observe: Callable[[Sequence[Structure], float | None], list[Observation]] | None = None
    once: Callable[[str, Callable[[], dict[str, object]]], dict[str, object]] = lambda step, work: work()
    compared: Callable[[Sequence[Choice]], None] = lambda choices: None
    distance: Distance | None = None

    @property
    def distance_of_outputs(self) -> Distance:
        """How outputs are compared."""
        return self.distance or default_distance(self.channels.graph)

    def costs(self, structure: Structure) -> dict[str, float]:
        """Exact MACs, parameters and memory of a structure."""
        found = self.channels.costs_of(structure)
        return {"macs": float(found.macs[0]), "params": float(found.params[0]), "memory": float(found.memory_bytes[0])}

    def over(self, ranks: bool = False, depth: bool = False) -> "Problem":
        """The same with ranks of layers and branches as further axes; engines are then built by this process, on a cluster too."""
        if not ranks and not depth:
            return self
        return replace(self, channels=SearchSpace.of(self.channels, ranks, depth), observe=None)


class MethodSettings:
    """What the settings of all methods have; their base."""

    name: ClassVar[str]
    of_paper: ClassVar[bool] = False

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return False

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data, with the name, and whether they are those of a paper."""
        return {"name": self.name, **({"published": True} if self.of_paper else {}), **asdict(self)}  # type: ignore[call-overload]


class Method(Protocol):
    """A compression method: a frozen value with its settings."""

    @property
    def name(self) -> str:
        """As the command knows it."""

    @property
    def compensation(self) -> Compensation | None:
        """How the network is repaired after removal; None for not at all."""

    @property
    def reduces_ranks(self) -> bool:
        """Whether layers may become sequences, so that a network need not have a channel that can go."""

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: No legal plan meets the limits; the closest that can is said.
        """

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""


@runtime_checkable
class FamilyMethod(Protocol):
    """A method that makes the plans of several budgets at once, at less than their cost one by one."""

    def plans(self, problems: Sequence[Problem]) -> list[Plan]:
        """One plan per problem; they differ in their limits only."""


def plans_of(method: Method, problems: Sequence[Problem]) -> list[Plan]:
    """The plans of a family of budgets."""
    if isinstance(method, FamilyMethod):
        return method.plans(problems)
    return [method.plan(problem) for problem in problems]
