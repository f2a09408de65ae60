"""Accept only what is faster: which factorized layers, and which that read through a gather, are not."""

from dataclasses import dataclass

from compressor.methods.base import Problem
from compressor.runtime.latency_model.pieces import GATHER, SEQUENCE, choices
from compressor.values.plan import Plan


def judged(problem: Problem, accept: bool | None) -> bool:
    """Whether factorized layers have to be faster; `None`: where the budget is a latency."""
    return "latency" in problem.limits if accept is None else accept


@dataclass(frozen=True)
class Refused:
    """What of a plan is not measured to be worth its time.

    Attributes:
        sequences: Layers that should not be factorized.
        gathers: Layers that should not read through a gather.
    """

    sequences: frozenset[str] = frozenset()
    gathers: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.sequences or self.gathers)


def refused(problem: Problem, plan: Plan, accept: bool | None, reads: bool = False) -> Refused:
    """The changes of a plan's layers that are not measured to make these faster.

    Args:
        problem: With the target.
        plan: The plan.
        accept: Whether factorized layers have to be faster; see `judged`.
        reads: Whether layers that read through a gather have to be.
    """
    asked = [part for part, wanted in ((GATHER, reads), (SEQUENCE, judged(problem, accept))) if wanted]
    layers = {GATHER: {name for name, _ in plan.reads}, SEQUENCE: {one.layer for one in plan.factors}}
    if not any(layers[part] for part in asked):
        return Refused()
    problem.progress.stage("layers that are factorized or read through a gather, measured beside the plain ones")
    found = choices(problem.channels, plan, problem.target, problem.once, problem.seed, asked)
    for choice in found:
        problem.progress.stage(str(choice))
    problem.compared(found)
    gone = {part: frozenset(c.layer for c in found if c.layer in layers[part] and part not in c.kept) for part in asked}
    return Refused(gone.get(SEQUENCE, frozenset()), gone.get(GATHER, frozenset()))
