"""How hard to compress: one number from 0 to 1, bisected until the budget is met."""

from collections.abc import Callable

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.structures.paths import AIM
from compressor.values.plan import Plan

_STEPS = 14  # where costs are computed; a level of 1e-4
_ENGINES = 7  # built and measured, where the budget is a latency


def least_within(problem: Problem, plan_at: Callable[[float], Plan], how: str) -> Plan:
    """The plan of the lowest level that meets the budget; a latency is measured.

    Args:
        problem: With the budget.
        plan_at: The plan at a level; 0 compresses nothing.
        how: What was tried, for the message: "the budget cannot be met{how}, this network has …".

    Raises:
        BudgetError: Not even level 1 meets it; what it costs is said.
    """
    limits = {name: limit for name, limit in problem.limits.items() if name != "latency"}

    def affordable(plan: Plan) -> bool:
        costs = problem.costs(problem.channels.structure(plan))
        return all(costs[name] <= limit for name, limit in limits.items())

    def fast_enough(plan: Plan) -> bool:
        return problem.measure(plan).ratio <= AIM * problem.limits["latency"]

    whole, hardest = 0.0, plan_at(1.0)
    if not affordable(hardest):
        costs = problem.costs(problem.channels.structure(hardest))
        said = ", ".join(f"{name} {costs[name]:,.0f} (asked: {limit:,.0f})" for name, limit in limits.items())
        raise BudgetError(f"the budget cannot be met{how}, this network has {said}")
    best = hardest
    if limits:
        whole, best = _bisected(whole, hardest, plan_at, affordable, _STEPS)
    if "latency" not in problem.limits:
        return best
    ratio, limit = problem.measure(hardest).ratio, problem.limits["latency"]
    if ratio > limit:
        said = f"latency {ratio:.3f} of the original's (asked: {limit:.3f})"
        raise BudgetError(f"the budget cannot be met{how}, this network has {said}")
    return _bisected(whole, hardest, plan_at, fast_enough, _ENGINES)[1]


def least_accepted(
    problem: Problem, plan_at: Callable[[float], Plan], how: str, refused: Callable[[Plan], frozenset[str]]
) -> tuple[Plan, frozenset[str]]:
    """The plan of `least_within`, and the layers of it that are refused; it is final where none is.

    Where not even level 1 meets a latency, its plan: what slows that down may be what keeps the latency from being met.

    Args:
        problem: See `least_within`.
        plan_at: See there.
        how: See there.
        refused: Which layers of a plan should be left plain.

    Raises:
        BudgetError: Not even level 1 meets the budget, and nothing of it is refused.
    """
    try:
        plan = least_within(problem, plan_at, how)
    except BudgetError:
        plan = plan_at(1.0)
        slow = refused(plan) if "latency" in problem.limits else frozenset()
        if not slow:
            raise
        return plan, slow
    return plan, refused(plan)


def _bisected(
    low: float, hardest: Plan, plan_at: Callable[[float], Plan], good: Callable[[Plan], bool], steps: int
) -> tuple[float, Plan]:
    """The lowest level found at which a plan is good, from `low`, which need not be, up to 1, whose plan is; and its plan."""
    high, best = 1.0, hardest
    for _ in range(steps):
        middle = 0.5 * (low + high)
        plan = plan_at(middle)
        if plan == best or good(plan):
            high, best = middle, plan
        else:
            low = middle
    return high, best
