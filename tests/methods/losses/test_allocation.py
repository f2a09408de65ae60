"""Widths and ranks by loss curves: prices of ranks, what is saved, the next weighting where one fails."""

from dataclasses import replace

import numpy as np
import pytest

from compressor import BudgetError
from compressor.methods.cap import CaP
from compressor.methods.losses.allocation import SAVED, Allocation, Weighting
from compressor.methods.losses.curves import curves_of
from compressor.passes.fitting.settings import Compensation

SMALL = Compensation(images=200, positions=8)


@pytest.fixture(scope="module")
def both(problem):
    joint = problem.over(ranks=True)
    return joint, curves_of(joint, joint.calibration, SMALL, 32)


def macs(problem, plan):
    return problem.costs(problem.channels.structure(plan))["macs"]


def lost(plan, size):
    return sum(size[name] - len(kept) for name, kept in plan.kept)


def test_the_dearer_a_rank_the_fewer_go(both):
    problem, curves = both
    allocation = Allocation(problem, curves, None)
    plans = [allocation.decide(Weighting("plain", price)) for price in (0.05, 0.25, 4.0, None)]
    size = {group.name: group.size for group in problem.channels.groups}
    assert all(0.9 * problem.limits["macs"] < macs(problem, plan) <= problem.limits["macs"] for plan in plans)
    sequences = [len(plan.factors) for plan in plans]
    assert sequences == sorted(sequences, reverse=True)
    assert sequences[0] > sequences[1] > sequences[-1] == 0
    assert lost(plans[0], size) < lost(plans[-1], size)


def test_a_plan_near_a_latency_is_found_without_measuring(both):
    """Without a model it is that share of the MACs."""
    problem, curves = both
    full = problem.costs(problem.channels.full)["macs"]
    plan = Allocation(replace(problem, limits={"latency": 0.6}, measure=None), curves, None).near(Weighting("plain"))
    assert 0.55 < macs(problem, plan) / full <= 0.6
    with pytest.raises(BudgetError, match="alone"):
        Allocation(replace(problem, limits={"latency": 1e-6}), curves, None).near(Weighting("plain"))


def test_where_a_weighting_cannot_meet_the_budget_the_next_is_tried(both):
    """By ranks alone this budget is out of reach."""
    problem, curves = both
    tight = replace(problem, limits={"macs": 0.05 * problem.costs(problem.channels.full)["macs"]})
    free = {group.name for group in problem.channels.groups if group.name in curves and "svd" not in group.name}
    allocation = Allocation(tight, {name: own for name, own in curves.items() if name not in free}, None)
    with pytest.raises(BudgetError):
        CaP.decided(tight, allocation, [Weighting("plain")])
    allocation = Allocation(tight, curves, None)
    without = Weighting("plain", None)
    allocation._paths[without] = allocation.path(without)[:2]  # a walk that stops far above the budget
    plan = CaP.decided(tight, allocation, [without, Weighting("plain")])
    assert macs(tight, plan) <= tight.limits["macs"]


class Steps:
    """Milliseconds that fall by the square of a width's eighths: other notches pay than by MACs."""

    def predict(self, rows):
        return (np.ceil(rows / 8) ** 2).sum(axis=1).astype(float)


def test_savings_of_a_latency_are_counted_in_milliseconds_in_macs_or_in_both(problem, both):
    curves = {group.name: both[1][group.name] for group in problem.channels.groups if group.name in both[1]}
    problem = replace(problem, limits={"latency": 0.5}, measure=None)
    allocation = Allocation(problem, curves, Steps())
    assert allocation.ways(None) == tuple(SAVED)
    plans = {saved: allocation.near(Weighting("plain", None, saved)) for saved in allocation.ways(None)}
    whole = Steps().predict(problem.channels.widths([problem.channels.full]))[0]
    for plan in plans.values():  # whatever is counted, the milliseconds are those of the budget
        rows = problem.channels.widths([problem.channels.structure(plan)])
        assert Steps().predict(rows)[0] <= 0.5 * whole
    assert plans["milliseconds"] != plans["macs"]
    by_macs = Allocation(problem, curves, None)
    assert by_macs.ways(None) == ("milliseconds",)
    own, plain = allocation.path(Weighting("plain", None, "macs")), by_macs.path(Weighting("plain", None))
    assert (own == plain).all()
