"""Magnitude: meets any budget, on legal widths, tightly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import compressor
from compressor import Budget, BudgetError, Magnitude, Target
from compressor.methods import Problem
from compressor.methods.magnitude import path_by_scores
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.paths import Widths, fitting
from compressor.passes.criteria import CRITERIA
from compressor.values.measurement import Measurement
from compressor.values.trial import Trial
from tests.networks import Residual, randomize

X = (torch.randn(2, 3, 8, 8),)
DATA = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]


def problem_of(budget, align=1, latency_of=None, model=None, train=DATA):
    channels = compressor.analyze(compressor.trace(model or randomize(Residual(32, 48)), X))
    full = channels.costs(channels.widths([channels.full]))
    original = {"macs": float(full.macs[0]), "params": float(full.params[0]), "memory": float(full.memory_bytes[0]), "latency": 1.0}
    asked = []

    def measure(plan):
        structure = channels.structure(plan)
        asked.append(structure)
        costs = channels.costs(channels.widths([structure]))
        times = (latency_of(float(costs.macs[0]) / original["macs"]),)
        return Trial(structure, Measurement(times, 0, "ok", {}, "s"), Measurement((1.0,), 0, "ok", {}, "s"))

    return Problem(channels, budget.limits(original), Target("fake", align=align), measure, train, 0), asked


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("bound", ["macs", "params", "memory"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_budget_is_met_and_no_notch_is_wasted(scope, bound, share):
    problem, _ = problem_of(Budget(**{bound: share}))
    plan = Magnitude(scope=scope).plan(problem)
    structure = problem.channels.structure(plan)
    assert problem.costs(structure)[bound] <= problem.limits[bound]
    current = dict(structure.widths)
    for group in problem.channels.free:
        if current[group.name] < group.size:
            wider = compressor.Structure(tuple((n, w + (n == group.name)) for n, w in structure.widths))
            assert problem.costs(wider)[bound] > problem.limits[bound], f"a channel of {group.name} went for nothing"
    removed = 1 - problem.costs(structure)[bound] / (problem.limits[bound] / share)
    assert removed <= (1 - share) + 0.05, "far more was removed than asked for"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_meets_several_bounds_at_once(criterion):
    problem, _ = problem_of(Budget(macs=0.6, params=0.3))
    found = problem.costs(problem.channels.structure(Magnitude(criterion).plan(problem)))
    assert found["macs"] <= problem.limits["macs"]
    assert found["params"] <= problem.limits["params"]


def test_uniform_removes_about_the_same_share_everywhere():
    problem, _ = problem_of(Budget(macs=0.25))
    found = dict(problem.channels.structure(Magnitude(scope="uniform").plan(problem)).widths)
    assert found["stem"] / 32 == pytest.approx(found["conv1"] / 48, abs=0.05)


def test_global_removes_more_where_channels_matter_less():
    model = randomize(Residual(32, 48))
    with torch.no_grad():
        model.conv1.weight[8:] *= 1e-3
    problem, _ = problem_of(Budget(macs=0.5), model=model)
    plan = dict(Magnitude(scope="global").plan(problem).kept)
    assert "stem" not in plan
    assert set(range(8)) <= set(plan["conv1"])


def test_widths_are_multiples_and_small_groups_are_not_skipped():
    problem, _ = problem_of(Budget(macs=0.4), align=8)
    found = dict(problem.channels.structure(Magnitude().plan(problem)).widths)
    assert found["stem"] % 8 == found["conv1"] % 8 == 0
    groups = {g.name: g for g in compressor.analyze(compressor.trace(Residual(12, 6), X)).groups}
    assert widths(groups["stem"], 8) == (4, 8, 12)
    assert widths(groups["conv1"], 8) == (2, 4, 6)
    assert widths(groups["fc"], 8) == (5,), "a frozen group has one width"
    assert widths(groups["stem"], 1)[:3] == (1, 2, 3)


@pytest.mark.parametrize("limit", [0.8, 0.5, 0.3])
def test_latency_is_searched_with_few_engines(limit):
    problem, asked = problem_of(Budget(latency=limit), align=2, latency_of=lambda share: 0.1 + 0.9 * share)
    structure = problem.channels.structure(Magnitude().plan(problem))
    share = problem.costs(structure)["macs"] / problem.costs(problem.channels.full)["macs"]
    assert limit * 0.85 <= 0.1 + 0.9 * share <= limit
    assert len(asked) <= 8


def test_latency_that_falls_in_steps_is_met_as_well():
    problem, asked = problem_of(Budget(latency=0.5), align=2, latency_of=lambda share: np.ceil(share * 6) / 6)
    structure = problem.channels.structure(Magnitude().plan(problem))
    share = problem.costs(structure)["macs"] / problem.costs(problem.channels.full)["macs"]
    assert np.ceil(share * 6) / 6 <= 0.5
    assert len(asked) <= 12


@pytest.mark.parametrize("seed", range(8))
def test_what_a_coarse_notch_leaves_of_a_latency_budget_is_used(seed):
    problem, asked = problem_of(Budget(latency=0.6), align=8, latency_of=lambda share: 0.1 + 0.9 * share)
    random = np.random.default_rng(seed)
    scores = {group.name: random.random(group.size) for group in problem.channels.free}
    space, path = Widths(problem, scores), path_by_scores(problem, scores, "global")
    stopped, filled = (problem.channels.structure(fitting(space, path, fill=fill)) for fill in (False, True))

    def ratio(structure):
        return 0.1 + 0.9 * problem.costs(structure)["macs"] / problem.costs(problem.channels.full)["macs"]

    assert ratio(stopped) <= ratio(filled) <= 0.6
    assert all(w >= dict(stopped.widths)[name] for name, w in filled.widths)
    for group in problem.channels.free:  # latency is linear in MACs here, so that the guess is exact and nothing that fits is left
        width = dict(filled.widths)[group.name]
        wider = compressor.Structure(tuple((n, w + 8 * (n == group.name)) for n, w in filled.widths))
        assert width == group.size or ratio(wider) > 0.97 * 0.6
    assert len(asked) <= 12


def test_budgets_that_cannot_be_met_say_the_closest_that_can():
    problem, _ = problem_of(Budget(macs="10"))
    with pytest.raises(BudgetError, match=r"smallest legal network has macs [\d,]+ \(asked: 10\)"):
        Magnitude().plan(problem)
    problem, _ = problem_of(Budget(latency=0.05), latency_of=lambda share: 0.1 + 0.9 * share)
    for align, advice in ((1, False), (8, True)):
        with pytest.raises(BudgetError, match=r"smallest legal network takes 0\.1\d+ of the original's") as raised:
            Magnitude().plan(replace(problem, target=replace(problem.target, align=align)))
        assert ("a smaller one allows narrower layers" in str(raised.value)) == advice


def test_the_plan_depends_on_the_seed_alone():
    for criterion in ("l1", "random"):
        model = randomize(Residual(32, 48))
        plans = [Magnitude(criterion).plan(problem_of(Budget(macs=0.5), model=model)[0]) for _ in range(2)]
        assert plans[0] == plans[1]


def test_taylor_without_data_says_what_it_needs():
    problem, _ = problem_of(Budget(macs=0.5), train=None)
    with pytest.raises(compressor.DataError, match="training data"):
        Magnitude("taylor").plan(problem)


@pytest.mark.parametrize("options", [{"criterion": "l3"}, {"scope": "local"}, {"aggregate": "median"}])
def test_unknown_settings_are_refused_with_the_known_ones(options):
    with pytest.raises(BudgetError, match="known are"):
        Magnitude(**options)
