"""A budget of quality: the fastest network that loses at most so many points, found by bisection."""

from collections.abc import Callable
from dataclasses import replace

from compressor.errors import BudgetError
from compressor.runs.result import Result

SHARES = tuple(k / 32 for k in range(31, 0, -1))
"""Of the original's latency: what is asked for on the way, of methods that decide for every budget anew; five networks are made."""


def fastest_within(
    drop: float, original: float, count: int, attempt: Callable[[int], Result | None]
) -> tuple[Result, list[Result]]:
    """The fastest network found that loses at most so many points, and all that were made, the slowest first.

    Args:
        drop: Points that may be lost.
        original: Metric of the original.
        count: How many budgets of latency can be asked for, one tighter than the other, so that more is lost.
        attempt: The network for one of them, by its number; None where it is out of reach.

    Raises:
        BudgetError: None of the networks made loses so little; what the nearest loses is said.
    """
    good, bad, made = -1, count, dict[int, Result]()
    while bad - good > 1:
        middle = (good + bad) // 2
        found = attempt(middle)
        if found is not None:
            lost = found.metric.lost(original, found.steps[-1].metric)
            made[middle] = found = replace(found, budget={**_others(found), "drop": (lost, drop)})
        if found is not None and lost <= drop:
            good = middle
        else:
            bad = middle
    results = [made[k] for k in sorted(made)]
    fitting = [one for one in results if one.budget["drop"][0] <= drop]
    if not fitting:
        said = ""
        if results:
            nearest = min(results, key=lambda one: one.budget["drop"][0])
            said = f"; the nearest, at {nearest.latency_ratio:.3f} of the latency, loses {nearest.budget['drop'][0]:.2f}"
        raise BudgetError(f"the budget cannot be met: no network was found that loses at most {drop:g} points{said}")
    return min(fitting, key=lambda one: one.latency_ratio), results


def _others(found: Result) -> dict[str, tuple[float, float]]:
    """The bounds that the user gave: the latency was only asked for on the way."""
    return {name: pair for name, pair in found.budget.items() if name != "latency"}
