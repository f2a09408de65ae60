"""Depth beside widths and ranks: budgets hold, branches go where that loses less, and what is decided is what is built."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch

import compressor
from compressor import AACP, BudgetError, CaP, Compensation, LeGR, Measurement, Target
from compressor.methods import Problem
from compressor.methods.losses.allocation import Allocation, Weighting
from compressor.methods.losses.curves import curves_of
from compressor.methods.losses.deep_allocation import DeepAllocation
from compressor.methods.published.aacp import PublishedAACP
from compressor.methods.published.legr import PublishedLeGR
from compressor.methods.searching.loss_ranking import LossRanking
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.paths import steepest
from compressor.passes.channels.search_space import columns_within, depth_of
from compressor.passes.statistics.calibration import Calibration
from compressor.search.fitness import Fitness
from compressor.values.trial import Trial
from tests.methods.conftest import digits, net, problem  # noqa: F401 - fixtures
from tests.methods.digits import pairs
from tests.methods.test_cap import repaired, share

SMALL = Compensation(images=200, positions=8)


def method(space, **settings):
    return CaP(space=space, compensation=SMALL, probes=60, **settings)


@pytest.mark.parametrize("space", ["depth", "channels+depth", "channels+ranks+depth"])
@pytest.mark.parametrize("limit", [0.75, 0.45])
def test_a_budget_holds_and_the_network_is_the_one_decided(problem, space, limit):  # noqa: F811
    full = problem.costs(problem.channels.full)["macs"]
    plan = method(space).plan(replace(problem, limits={"macs": limit * full}))
    structure = problem.channels.structure(plan)
    assert problem.costs(structure)["macs"] <= limit * full
    graph = compressor.apply(plan, problem.channels.graph)
    again = compressor.analyze(graph)
    assert again.costs_of(again.full).macs[0] == problem.costs(structure)["macs"]
    if space == "depth":
        assert plan.removed
        assert not plan.kept
        assert not plan.factors


@pytest.mark.parametrize("space", ["depth", "channels+depth", "channels+ranks+depth"])
@pytest.mark.parametrize("searching", [LeGR, AACP, PublishedLeGR, PublishedAACP], ids=lambda kind: kind.__name__)
def test_the_searches_decide_over_branches_too(problem, searching, space):  # noqa: F811
    full = problem.costs(problem.channels.full)["macs"]
    few = {"population": 4} if issubclass(searching, PublishedLeGR) else {}
    found = searching(trials=8, fitness=Fitness("none", holdout=60), space=space, compensation=None, **few)
    plan = found.plan(replace(problem, limits={"macs": 0.7 * full}))
    structure = problem.channels.structure(plan)
    assert problem.costs(structure)["macs"] <= 0.7 * full
    again = compressor.analyze(compressor.apply(plan, problem.channels.graph))
    assert again.costs_of(again.full).macs[0] == problem.costs(structure)["macs"]
    assert plan.removed or space != "depth"
    if space == "depth":
        assert not plan.kept
        assert not plan.factors


def test_the_plain_ranking_walks_the_steepest_path_over_branches_too(problem):  # noqa: F811
    deep = problem.over(depth=True)
    groups, holds = deep.channels.groups, columns_within(deep.channels)
    options = [widths(group, 4) for group in groups]
    curves = curves_of(deep, deep.calibration, SMALL, 60)
    legal = {k: options[k] for k, group in enumerate(groups) if group.name in curves}
    losses = {k: curves[groups[k].name] for k in legal}
    losses = {k: curve.ranking.loss[list(legal[k])] * curve.sensitivity**0.5 for k, curve in losses.items()}

    def macs(rows):
        return deep.channels.costs.macs(rows).astype(float)

    path = steepest([group.size for group in groups], legal, losses, macs, holds)
    assert (path[:, list(holds)] == 0).any(), "a branch goes on the way"
    ranking = LossRanking(deep, SMALL, options, macs, probes=60)
    walked = {tuple(row) for row in GlobalRanking(groups, options).walk(ranking.plain).path()}
    assert {tuple(row) for row in path} <= walked

    def lost(row):
        gone = {own for k, inner in holds.items() if row[k] == 0 for own in inner}
        return sum(float(losses[k][legal[k].index(row[k])]) for k in legal if k not in gone)

    highest, expected = 0.0, {}  # the price of each branch, and what it held had lost before
    for before, after in zip(path[:-1].tolist(), path[1:].tolist(), strict=True):
        saved = float(-np.diff(macs(np.array([before, after])))[0])
        if saved <= 0:  # what is in a branch that is gone already
            break
        highest = max(highest, (lost(after) - lost(before)) / saved)
        for k in holds:
            if before[k] > after[k]:
                expected[k] = highest, sum(float(losses[own][legal[own].index(before[own])]) for own in holds[k])
    assert any(held > 0 for _, held in expected.values()), "a branch that was narrowed before it went"
    for k, (price, _) in expected.items():
        assert ranking.plain[groups[k].name][0] == pytest.approx(np.log(price), abs=1e-6)


def test_a_network_without_a_branch_is_one_candidate_whatever_the_branch_would_hold(problem, tmp_path):  # noqa: F811
    full = problem.costs(problem.channels.full)["macs"]
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    found = PublishedAACP(trials=12, population=4, fitness=Fitness("none", holdout=60), space="channels+depth")
    found.plan(replace(problem, limits={"macs": 0.6 * full}, storage=storage))
    (study,) = optuna.get_all_study_names(storage)
    space = problem.over(depth=True).channels
    rows = [np.array(t.user_attrs["structure"]["widths"]) for t in optuna.load_study(study_name=study, storage=storage).trials]
    assert any(space.structure_of(row).removed for row in rows)
    for row in rows:
        assert (space.widths([space.structure_of(row)])[0] == row).all()


def test_what_a_branch_holds_no_longer_counts_once_it_is_gone():
    losses = {0: np.array([4.1, 1.5, 0.0]), 1: np.array([6.0, 0.0])}
    rows = steepest(
        [2, 1], {0: [0, 1, 2], 1: [0, 1]}, losses, lambda own: (10 * own[:, 1] * (1 + own[:, 0])).astype(float), {1: [0]}
    )
    assert rows.tolist() == [[2, 1], [1, 1], [1, 0], [0, 0]]  # 6 - 1.5 for the 20 that are left; what it held comes last


def test_limits_hold_together_and_one_that_does_not_bind_changes_nothing(problem):  # noqa: F811
    full = problem.costs(problem.channels.full)
    alone, with_another = (
        method("channels+depth").plan(replace(problem, limits={"macs": 0.7 * full["macs"], **more}))
        for more in ({}, {"params": 1.05 * full["params"]})
    )
    spent = [problem.costs(problem.channels.structure(plan))["macs"] for plan in (alone, with_another)]
    assert spent[1] == pytest.approx(spent[0], rel=0.03)
    tight = method("channels+depth").plan(replace(problem, limits={"macs": 0.9 * full["macs"], "params": 0.4 * full["params"]}))
    found = problem.costs(problem.channels.structure(tight))
    assert found["macs"] <= 0.9 * full["macs"]
    assert found["params"] <= 0.4 * full["params"]


def test_the_loss_of_a_branch_is_that_of_its_sum_after_repair(problem):  # noqa: F811
    deep = problem.over(depth=True)
    curves = curves_of(deep, problem.calibration, SMALL, 60)
    names = [axis.name for axis in depth_of(deep.channels)]
    assert names == ["branch blocks.0", "branch blocks.1"]
    for name in names:
        gone, there = curves[name].ranking.loss
        assert gone > there == 0
        assert curves[name].sensitivity > 0


def test_depth_and_widths_are_at_least_as_near_as_either(problem):  # noqa: F811
    full = problem.costs(problem.channels.full)["macs"]
    limited = replace(problem, limits={"macs": 0.45 * full})
    right = {space: share(problem, repaired(problem, method(space).plan(limited))) for space in ("channels", "channels+depth")}
    assert right["channels+depth"] >= right["channels"] - 0.02


def test_the_same_seed_gives_the_same_plan_and_nothing_is_computed_twice(problem):  # noqa: F811
    known: dict[str, dict[str, object]] = {}

    def once(name, work):
        if name not in known:
            known[name] = work()
        return known[name]

    first = method("channels+depth").plan(replace(problem, once=once))
    count = len(known)
    assert method("channels+depth").plan(replace(problem, once=once)) == first
    assert len(known) == count
    assert any("branches" in name for name in known)


def test_a_latency_is_met_as_measured(problem):  # noqa: F811
    """By a device on which every layer takes the same time: depth alone helps."""
    count = sum(isinstance(m, torch.nn.Conv2d) for m in problem.channels.graph.modules())

    def measure(plan):
        graph = compressor.apply(plan, problem.channels.graph)
        layers = sum(isinstance(m, torch.nn.Conv2d) for m in graph.modules())
        found, original = (Measurement((float(n),) * 5, 0, "ok", {}, "one") for n in (layers, count))
        return Trial(problem.channels.structure(plan), found, original)

    curves = curves_of(problem.over(depth=True), problem.calibration, SMALL, 60)
    limited = replace(
        problem.over(depth=True), limits={"latency": 4 / count + 0.06}, measure=measure, target=Target("fake", align=1)
    )
    plan = DeepAllocation(limited, curves, None).decide(Weighting("sensitivity"))
    assert len(plan.removed) == 1
    with pytest.raises(BudgetError, match="closest network measured takes"):
        DeepAllocation(replace(limited, limits={"latency": 0.2}), curves, None).decide(Weighting("sensitivity"))


def test_a_floor_goes_down_by_depth_too(problem):  # noqa: F811
    plan = method("channels+depth", floor=0.9, holdout=200).plan(replace(problem, limits={}))
    assert problem.costs(problem.channels.structure(plan))["macs"] < 0.8 * problem.costs(problem.channels.full)["macs"]


def test_without_a_branch_depth_says_so(digits):  # noqa: F811
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10))
    graph = compressor.trace(model, (torch.zeros(2, 1, 8, 8),))
    channels = compressor.analyze(graph)
    images = list(digits["train"][0][:200].split(50))
    calibration = Calibration.read(images, graph, 200)
    alone = Problem(channels, {"macs": 1e4}, Target("fake", align=1), None, None, 0, (), calibration)
    with pytest.raises(BudgetError, match="no branch beside a shortcut"):
        method("depth").plan(alone)


def test_compress_removes_branches_and_goes_on_after_a_kill(net, digits, tmp_path):  # noqa: F811
    arguments = {
        "train": pairs(digits["train"]), "validate": pairs(digits["holdout"]), "budget": compressor.Budget(macs=0.6),
        "target": Target(threads=1), "method": method("depth"), "finetune": compressor.FineTune(epochs=0), "out": tmp_path / "run",
    }  # fmt: skip
    result = compressor.compress(net, (torch.zeros(2, 1, 8, 8),), **arguments)
    assert result.met
    assert result.plan.removed
    assert f"branches removed: {result.plan.removed[0]}" in result.summary()
    assert f"gone with {result.plan.removed[0]}" in (tmp_path / "run" / "report.html").read_text()
    x = digits["test"][0][:16]
    with torch.no_grad():
        expected = result.graph(x)
        for again in (compressor.load(tmp_path / "run"), compressor.load(tmp_path / "run", net)):
            torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-4)
    (tmp_path / "run" / "weights.safetensors").unlink()
    resumed = compressor.compress(net, (torch.zeros(2, 1, 8, 8),), **arguments)
    assert resumed.plan == result.plan
    assert [s.metric for s in resumed.steps] == [s.metric for s in result.steps]


class Milliseconds:
    """A latency that falls with every channel by equal parts, whatever the branches: so that they stay."""

    def predict(self, rows):
        return rows.astype(float).sum(axis=1)


def test_where_every_branch_stays_widths_are_also_decided_as_if_none_could_go(problem):  # noqa: F811
    deep = replace(problem.over(depth=True), limits={"latency": 0.6})
    allocation = DeepAllocation(deep, curves_of(deep, deep.calibration, SMALL, 60), Milliseconds())
    plain = Allocation(problem.over(depth=False), {}, Milliseconds())
    there, gone = deep.channels.plan(0.9), replace(deep.channels.plan(0.9), removed=(deep.channels.branches[0].name,))
    assert allocation.ways(there) == plain.ways(None)
    assert allocation.ways(gone) == allocation.ways(None) == ("milliseconds",)
    for saved in plain.ways(None)[1:]:
        plan = allocation.near(Weighting("plain", None, saved))
        assert not plan.removed
        assert plan.kept
        rows = deep.channels.widths([deep.channels.structure(plan)])
        assert Milliseconds().predict(rows)[0] <= 0.6 * Milliseconds().predict(deep.channels.widths([deep.channels.full]))[0]
