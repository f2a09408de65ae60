"""`CC`: channels and ranks of each layer together, by what they lose of its features.

`CC.published()` is the paper (`published/cc.py`). Ours keeps its idea, that channels and ranks compete for the same budget, and
decides by what a layer's features lose on real images *after* compensation, instead of a Taylor expansion of the loss in its
weights. Channels and ranks are then those of `CaP(space="channels+ranks")`, which decides: a channel is removed with its
producer, for all who read it, and what it saves there counts. ResNet-56 at half its MACs keeps 92.1 % before any training; as
published 83.3 %, and 90.4 % where that is compensated.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from compressor.errors import BudgetError
from compressor.methods.base import MethodSettings, Problem, Space
from compressor.methods.cap import CaP
from compressor.methods.published.cc import PublishedCC
from compressor.passes.fitting.settings import Compensation
from compressor.values.plan import Plan
from compressor.values.settings import check


@dataclass(frozen=True)
class CC(MethodSettings):
    """Compress channels and ranks together.

    Attributes:
        space: What may go; see `CaP`.
        accept: Whether factorized layers have to be faster on the target; `None`: where the budget is a latency.
        compensation: How the network is repaired; None for not at all.

    Raises:
        BudgetError: A setting is none of these.
    """

    name: ClassVar[str] = "cc"
    space: Space = "channels+ranks"
    accept: bool | None = None
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError)

    @classmethod
    def published(cls, images: int = 10_000) -> PublishedCC:
        """As in the paper and its released code; gradients of at most so many training images."""
        return PublishedCC(images=images)

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return self.space != "channels"

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: The budget cannot be met; the closest that can is said.
            DataError: There are no calibration images.
        """
        return CaP(space=self.space, accept=self.accept, compensation=self.compensation).plan(problem)
