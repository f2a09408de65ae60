"""Only what is faster stays factorized."""

from dataclasses import replace

import pytest

from compressor import Target
from compressor.methods.structures.slower_sequences import refused
from compressor.values.plan import Factorization, Plan

STAIRS = Target("fake", options={"step": 16, "noise": 0.001})


@pytest.fixture
def plan(problem):
    """A sequence that saves time on a device that computes 16 channels at once, and one that does not."""
    return Plan.keep(
        {}, problem.channels.digest, factors=[Factorization("blocks.0.0", "svd", (3,)), Factorization("last", "svd", (17,))]
    )


def test_it_is_asked_where_the_budget_is_a_latency_or_somebody_says_so(problem, plan):
    asked = replace(problem, target=STAIRS)
    fast = replace(asked, limits={"latency": 0.5})
    found = [bool(refused(p, plan, accept)) for p in (asked, fast) for accept in (None, True, False)]
    assert found == [False, True, False, True, True, False]


def test_the_slow_ones_are_named_and_all_are_handed_to_the_result(problem, plan):
    said = []
    asked = replace(problem, target=STAIRS, compared=said.extend)
    slow = refused(asked, plan, accept=True)
    assert {choice.layer: choice.faster for choice in said} == {name: name not in slow for name in ("blocks.0.0", "last")}
    assert "last" in slow
    for choice in said:
        assert choice.faster == (choice.changed_ms < 0.99 * choice.dense_ms) or choice.changed_ms == pytest.approx(
            choice.dense_ms, rel=0.05
        )


def test_where_nobody_asks_nothing_is_measured(problem, plan):
    said = []
    assert not refused(replace(problem, compared=said.extend), plan, accept=None)
    assert said == []


def test_what_is_not_judged_is_there_on_both_sides(problem):
    """Whether a sequence pays is asked of the layer as it will be built: with its gather."""
    one = Factorization("blocks.0.0", "svd", (3,))
    plans = [Plan.keep({}, problem.channels.digest, reads, [one]) for reads in ({}, {"blocks.0.0": range(4)})]
    said = []
    for plan in plans:
        refused(replace(problem, target=Target("fake", options={"noise": 0.001}), compared=said.extend), plan, accept=True)
    assert said[1].dense_ms < 0.9 * said[0].dense_ms
    assert said[1].changed_ms < said[0].changed_ms
