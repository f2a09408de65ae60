"""Accept only what is faster: which factorized layers are not."""

from compressor.methods.base import Problem
from compressor.runtime.latency_model.single_layers import choices
from compressor.values.plan import Plan


def refused(problem: Problem, plan: Plan, accept: bool | None) -> frozenset[str]:
    """The factorized layers of a plan whose sequences are not measured to be faster than the plain layers.

    Args:
        problem: With the target.
        plan: The plan.
        accept: Whether they have to be; `None`: where the budget is a latency.
    """
    judged = "latency" in problem.limits if accept is None else accept
    if not judged or not plan.factors:
        return frozenset()
    problem.progress.stage("layers that are factorized, measured beside the plain ones")
    found = choices(problem.channels, plan, problem.target, problem.once, problem.seed)
    for choice in found:
        problem.progress.stage(str(choice))
    problem.compared(found)
    return frozenset(choice.layer for choice in found if not choice.faster)
