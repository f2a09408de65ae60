"""Whether the network of a plan meets the budget, and what to say where it does not."""

from compressor.methods.base import Problem
from compressor.values.plan import Plan


def meets(problem: Problem, plan: Plan, aim: float = 1.0) -> bool:
    """Whether a plan meets every limit.

    Args:
        problem: With the limits.
        plan: The plan; it is built and measured where latency is limited and the other limits are met.
        aim: Share of the limit of latency that counts as met.
    """
    costs = problem.costs(problem.channels.structure(plan))
    if any(costs[name] > limit for name, limit in problem.limits.items() if name in costs):
        return False
    return "latency" not in problem.limits or problem.measure(plan).ratio <= aim * problem.limits["latency"]


def closest(problem: Problem, plan: Plan) -> str:
    """What a plan has beside what was asked, for a message."""
    costs = problem.costs(problem.channels.structure(plan))
    said = [f"{name} {costs[name]:,.0f} (asked: {limit:,.0f})" for name, limit in problem.limits.items() if name in costs]
    if "latency" in problem.limits:
        said.append(f"latency {problem.measure(plan).ratio:.3f} of the original (asked: {problem.limits['latency']:.3f})")
    return "the closest has " + ", ".join(said)
