"""The lowest level that meets a budget."""

from dataclasses import replace

import pytest

from compressor import BudgetError
from compressor.methods.structures.bisect_level import least_within
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.measuring.measure import Comparison
from compressor.values.plan import Plan
from compressor.values.trial import Trial


def narrowed(problem, level):
    """All inner groups alike, one channel at least."""
    kept = {g.name: tuple(range(max(round((1 - level) * g.size), 1))) for g in problem.channels.free}
    return Plan.keep(kept, problem.channels.digest)


def macs(problem, plan):
    return problem.costs(problem.channels.structure(plan))["macs"]


def test_it_is_the_lowest_level_and_no_lower_one_is_within(problem):
    asked = []

    def plan_at(level):
        asked.append(level)
        return narrowed(problem, level)

    plan = least_within(problem, plan_at, "")
    good = [level for level in asked if macs(problem, narrowed(problem, level)) <= problem.limits["macs"]]
    bad = [level for level in asked if level not in good]
    assert plan == narrowed(problem, min(good))
    assert max(bad) < min(good) <= max(bad) + 1e-3


def test_what_cannot_be_met_says_what_the_hardest_network_costs(problem):
    asked = replace(problem, limits={"macs": 10.0})
    with pytest.raises(BudgetError, match=r"cannot be met by narrowing, this network has macs [\d,]+ \(asked: 10\)"):
        least_within(asked, lambda level: narrowed(problem, level), " by narrowing")


def test_a_latency_is_that_of_the_built_network(problem):
    with Comparison(problem.channels.graph, problem.target, 0) as comparison:

        def measure(plan):
            found, original = comparison.measure(applied(plan, problem.channels))
            return Trial(problem.channels.structure(plan), found, original)

        asked = replace(problem, limits={"latency": 0.6}, measure=measure)
        plan = least_within(asked, lambda level: narrowed(problem, level), "")
        assert 0.55 < measure(plan).ratio <= 0.6
        with pytest.raises(BudgetError, match=r"this network has latency 0\.\d+ of the original's \(asked: 0\.010\)"):
            least_within(replace(asked, limits={"latency": 0.01}), lambda level: narrowed(problem, level), "")
