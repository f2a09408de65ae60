"""LeGR: walks, the rankings they start from, families."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from compressor import Target
from compressor.methods.losses.curves import curves_of
from compressor.methods.searching.loss_ranking import LossRanking
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.paths import steepest
from compressor.methods.structures.searched_widths import above_quota
from tests.methods.searches import SMALL, TARGET, legr, macs_of, unfilled


@pytest.fixture(scope="module")
def problem(problem):
    return replace(problem, target=TARGET)


def test_a_family_comes_from_one_search_and_its_members_are_nested(problem):
    full = float(problem.channels.costs_of(problem.channels.full).macs[0])
    shares = (0.8, 0.65, 0.5, 0.35)
    problems = [replace(problem, limits={"macs": share * full}) for share in shares]
    plans = unfilled().plans(problems)
    kept = [dict(plan.kept) for plan in plans]
    for share, plan in zip(shares, plans, strict=True):
        costs = problem.costs(problem.channels.structure(plan))
        assert 0.75 * share * full <= costs["macs"] <= share * full
    for wide, narrow in itertools.pairwise(kept):  # by one ranking: what has gone stays away
        for name, units in wide.items():
            assert set(narrow[name]) <= set(units)
    assert plans[-1] == unfilled().plan(problems[-1]), "learnt at the tightest budget"


def test_a_filled_walk_leaves_nothing_that_still_fits(problem):
    groups, left = problem.channels.groups, {False: [], True: []}
    for fill, share in itertools.product((False, True), (0.7, 0.8, 0.9, 1.0)):
        limits = {"macs": share * problem.limits["macs"]}
        coarse = replace(problem, target=replace(problem.target, align=8), limits=limits)
        row = coarse.channels.widths([coarse.channels.structure((legr if fill else unfilled)(1, population=1).plan(coarse))])[0]
        wider = []
        for k, group in enumerate(groups):
            for width in [w for w in widths(group, 8) if w > row[k]][:1]:
                wider.append(row.copy())
                wider[-1][k] = width
        left[fill].append((coarse.channels.costs.macs(np.stack(wider)) <= limits["macs"]).any())
    assert any(left[False]), "the plain walk stops early somewhere"
    assert not any(left[True]), "the filled one uses what is left"


def test_the_first_trials_are_the_allocations_of_the_other_weightings(problem):
    """Another power of the sensitivities moves each group as a whole: exactly, where losses are convex."""
    options = [widths(group, 4) for group in problem.channels.groups]
    genome, others = (
        [LossRanking(problem, SMALL, options, macs_of(problem), power) for power in powers] for powers in ((0.5,), (0.0, 1.0))
    )
    found = []
    for params, other in zip(genome[0].start, others, strict=True):
        moved, plain = genome[0].scores(params), other.plain
        for name in plain:
            assert (np.argsort(moved[name]) == np.argsort(plain[name])).all()
        walks = [GlobalRanking(problem.channels.groups, options).walk(scores).path() for scores in (moved, plain)]
        shared = {tuple(row) for row in walks[0]} & {tuple(row) for row in walks[1]}
        found.append(len(shared) / len(walks[1]))
    assert min(found) > 0.5, "most structures of the walks are the same"


@pytest.mark.parametrize("driver", ["macs", "latency"])
def test_the_plain_ranking_is_the_path_that_loses_least_for_what_the_budget_counts(problem, driver):
    asked = replace(problem, limits={driver: 0.5 * (problem.limits["macs"] if driver == "macs" else 1.0)})
    groups = asked.channels.groups
    options = [widths(group, 4) for group in groups]
    affordable = Affordable(asked, options, 8)
    assert (affordable.model is not None) == (driver == "latency")
    curves = curves_of(asked, asked.calibration, SMALL, 256)
    legal = {k: options[k] for k, group in enumerate(groups) if group.name in curves}
    losses = {k: curves[groups[k].name] for k in legal}
    losses = {k: curve.ranking.loss[list(legal[k])] * curve.sensitivity**0.5 for k, curve in losses.items()}
    start = [group.size for group in groups]
    prices = {"macs": macs_of(asked)} | ({"latency": affordable.model.predict} if affordable.model else {})
    paths = {name: {tuple(row) for row in steepest(start, legal, losses, price)} for name, price in prices.items()}
    ranking = LossRanking(asked, SMALL, options, affordable.price)
    walked = {tuple(row) for row in GlobalRanking(groups, options).walk(ranking.plain).path()}
    assert paths[driver] <= walked
    assert driver == "macs" or not paths["macs"] <= walked, "the two orders differ"


def test_the_identity_of_the_loss_ranking_is_the_allocation_by_loss_curves(problem):
    options = [widths(group, 4) for group in problem.channels.groups]
    genome = LossRanking(problem, SMALL, options, macs_of(problem))
    middle = {name: 1.0 if name.startswith("scale") else 0.0 for name in genome.space}
    walk = GlobalRanking(problem.channels.groups, options).walk(genome.scores(middle))
    plain = GlobalRanking(problem.channels.groups, options).walk(genome.plain)
    assert (walk.path() == plain.path()).all()


def test_staircases_are_measured_where_latency_is_limited_and_only_there(problem):
    measured = []

    def once(name, work):
        measured.append(name)
        return work()

    coarse = replace(problem, target=Target("fake", align=4, options={"step": 8, "noise": 0.0}), once=once)
    legr(2, population=1).plan(coarse)
    assert not [name for name in measured if name.startswith("staircase")]
    limited = replace(coarse, limits={"latency": 0.8}, measure=lambda plan: SimpleNamespace(ratio=0.78))
    structure = problem.channels.structure(legr(2, engines=8, population=1).plan(limited))
    assert [name for name in measured if name.startswith("staircase")]
    sizes = {group.name: group.size for group in problem.channels.groups}
    assert all(width % 8 == 0 or width in (4, sizes[name]) for name, width in structure.widths)


def test_where_all_steps_lie_below_the_quota_multiples_above_it_are_walked(problem):
    group = max(problem.channels.free, key=lambda g: g.size)
    above = tuple(w for w in range(4, group.size + 1, 4) if w >= group.size / 2)
    assert above_quota(group, (4, group.size), 4, 0.5) == above
    assert above_quota(group, (4, group.size - 4, group.size), 4, 0.5) == (group.size - 4, group.size)
