"""Accept only what is faster: which factorized layers, and which that read through a gather, are not."""

from compressor.methods.base import Problem
from compressor.plan import Plan
from compressor.runtime.pieces import choices


def judged(problem: Problem, accept: bool | None) -> bool:
    """Whether factorized layers have to be faster; `None`: where the budget is a latency."""
    return "latency" in problem.limits if accept is None else accept


def refused(problem: Problem, plan: Plan, accept: bool | None, reads: bool = False) -> set[str]:
    """The changed layers of a plan that are not measured to be faster than they would be without the change.

    Args:
        problem: With the target.
        plan: The plan.
        accept: Whether factorized layers have to be faster; see `judged`.
        reads: Whether layers that read through a gather have to be.
    """
    factored = plan.factors if judged(problem, accept) else ()
    asked = Plan.keep(dict(plan.kept), plan.model, dict(plan.reads) if reads else {}, factored)
    if not (asked.factors or asked.reads):
        return set()
    problem.progress.stage("layers that are factorized or read through a gather, measured beside the plain ones")
    found = choices(problem.channels, asked, problem.target, problem.once, problem.seed)
    for choice in found:
        problem.progress.stage(str(choice))
    problem.compared(found)
    return {choice.layer for choice in found if not choice.faster}
