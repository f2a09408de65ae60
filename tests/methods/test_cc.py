"""CC as a method: budgets hold, options do what they say, slow sequences are refused, a killed search goes on."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor import CC, Budget, BudgetError, CaP, Compensation, FineTune, Target
from compressor.errors import DataError
from compressor.methods import Problem
from compressor.methods.layers.cc_removal import State
from compressor.methods.layers.unit_plans import UnitPlans
from compressor.methods.published.cc import PublishedCC
from compressor.passes.channels.layer_costs import macs_by_layer
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.losses import rankable
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.transforms.apply_plan import applied
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.passes.transforms.verify import verify_removal
from compressor.runtime.latency_model.single_layers import Variant, choices, piece, variants_of
from compressor.runtime.measuring.measure import Comparison
from compressor.training.gradients import squared_gradients
from compressor.values.plan import Factorization, Plan
from compressor.values.trial import Trial
from tests.methods.digits import pairs

SMALL = Compensation(images=200, positions=8)


def share_of(problem, plan):
    costs = [problem.costs(s)["macs"] for s in (problem.channels.structure(plan), problem.channels.full)]
    return costs[0] / costs[1]


def measured(channels, plan, target):
    return {choice.layer: choice for choice in choices(channels, plan, target, lambda name, work: work())}


@pytest.mark.parametrize("units", ["both", "channels", "ranks"])
def test_the_published_plan_meets_the_budget_closely_and_is_what_is_built(problem, units):
    full = problem.costs(problem.channels.full)["macs"]
    plan = PublishedCC(units, images=300).plan(replace(problem, limits={"macs": 0.6 * full}))
    assert 0.52 < share_of(problem, plan) <= 0.6
    assert bool(plan.reads) <= (units != "ranks")
    assert not plan.factors or units != "channels"
    built = applied(plan, problem.channels)
    found = compressor.analyze(built)
    assert found.costs_of(found.full).macs[0] == problem.costs(problem.channels.structure(plan))["macs"]
    dense = Plan.keep(dict(plan.kept), plan.model, dict(plan.reads))
    assert verify_removal(problem.channels, dense, applied(dense, problem.channels)).relative_error < 1e-5


@pytest.mark.parametrize("space", ["channels+ranks", "channels", "ranks", "channels+ranks+depth"])
def test_by_features_the_budget_is_met_closely_and_what_is_built_costs_that(problem, space):
    full = problem.costs(problem.channels.full)["macs"]
    plan = CC(space, compensation=SMALL).plan(replace(problem, limits={"macs": 0.6 * full}))
    assert 0.5 < share_of(problem, plan) <= 0.6
    assert bool(plan.kept) == (space != "ranks")
    assert bool(plan.factors) == ("ranks" in space) or "depth" in space
    built = applied(plan, problem.channels)
    found = compressor.analyze(built)
    assert found.costs_of(found.full).macs[0] == problem.costs(problem.channels.structure(plan))["macs"]
    if space == "channels":
        assert plan == CaP(compensation=SMALL).plan(replace(problem, limits={"macs": 0.6 * full}))


@pytest.mark.parametrize("case", ["not repaired", "several", "latency"])
def test_channels_and_ranks_by_loss_curves_under_other_settings(problem, case):
    full = problem.costs(problem.channels.full)
    limits = {"macs": 0.7 * full["macs"], "params": 0.6 * full["params"]} if case == "several" else {"macs": 0.7 * full["macs"]}
    method = CaP(space="channels+ranks", compensation=None if case == "not repaired" else SMALL)
    target = Target("fake", align=1, options={"noise": 0.001})
    asked = replace(problem, limits={"latency": 0.7} if case == "latency" else limits, target=target)
    if case == "latency":
        with Comparison(problem.channels.graph, target, 0) as comparison:

            def measured_of(plan):
                found, original = comparison.measure(applied(plan, problem.channels))
                return Trial(problem.channels.structure(plan), found, original)

            plan = method.plan(replace(asked, measure=measured_of))
            assert 0.6 < measured_of(plan).ratio <= 0.71
    else:
        plan = method.plan(asked)
        costs = problem.costs(problem.channels.structure(plan))
        assert all(costs[name] <= limit for name, limit in limits.items())
        assert any(costs[name] > 0.9 * limit for name, limit in limits.items())


def test_without_a_layer_worth_a_sequence_there_are_no_ranks():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    graph = compressor.trace(net.eval(), (torch.zeros(2, 3, 4, 4),))
    channels = compressor.analyze(graph)
    images = Calibration.read([(torch.randn(20, 3, 4, 4),)], graph, 20)
    with pytest.raises(BudgetError, match="there are no ranks to reduce"):
        CC("ranks").plan(Problem(channels, {"macs": 1.0}, Target("fake"), None, None, 0, calibration=images))


def test_by_features_redundant_channels_and_redundant_rank_go_and_nothing_is_lost():
    """`a` makes each of its channels twice, `b` has rank 6: half of the one and most of the other go, exactly."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.Conv2d(32, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[12:] = tensor[:12]
        wide = torch.randn(32, 6) @ torch.randn(6, 144) / 20
        net[4].weight.copy_(wide.reshape(32, 16, 3, 3))
    graph = compressor.trace(net.eval(), (torch.zeros(2, 3, 10, 10),))
    channels = compressor.analyze(graph)
    images = torch.randn(120, 3, 10, 10)
    costs = channels.costs_of(channels.full).macs[0]
    problem = Problem(
        channels, {"macs": 0.465 * costs}, Target("fake", align=1), None, None, 0,
        calibration=Calibration.read([(images,)], graph, 120),
    )  # fmt: skip
    settings = Compensation(images=90, positions=40, ridge=1e-9)
    plan = CC(compensation=settings).plan(problem)
    assert plan.factors == (Factorization("4", "svd", (6,)),)
    ((group, kept),) = plan.kept
    assert next(g for g in channels.groups if g.name == group).layers == ("0",)
    assert sorted(k % 12 for k in kept) == list(range(12))
    found = Compensate(channels, plan, problem.calibration, settings).run(RemoveChannels(plan, channels)(graph).graph).graph
    found = FactorizeConv(plan.factors)(found).graph
    torch.testing.assert_close(found(images), graph(images), rtol=1e-3, atol=1e-4)


def test_squared_gradients_are_those_of_autograd(net, digits):
    x, y = digits["train"]
    batches = [(x[:40], y[:40]), (x[40:60], y[40:60])]
    own = []
    for inputs, labels in batches:
        net.zero_grad()
        F.cross_entropy(net.eval()(inputs), labels).backward()
        own.append(net.stem.weight.grad.double().clone())
    net.zero_grad()
    mean = squared_gradients(net, batches, 60)["stem.weight"]
    torch.testing.assert_close(mean, ((40 * own[0] + 20 * own[1]) / 60).square(), rtol=1e-4, atol=1e-12)
    assert not torch.allclose(squared_gradients(net, batches, 50)["stem.weight"], mean)
    with pytest.raises(DataError, match="no labelled images"):
        squared_gradients(net, [], 10)


def test_a_channel_goes_with_its_producer_where_nobody_else_reads_it(problem):
    channels = problem.channels
    inner = next(name for name, readers in rankable(channels)[0].items() if [r.layer for r in readers] == ["blocks.0.3"])
    states = {"blocks.0.3": State((0, 3, 5), None, 0.0, 1)}
    plan = UnitPlans(channels).plan(states)
    assert dict(plan.kept) == {inner: (0, 3, 5)}
    assert not plan.reads


def test_a_channel_that_others_read_is_gathered(problem):
    channels = problem.channels
    states = {"blocks.0.0": State((1, 2), None, 0.0, 1)}
    assert UnitPlans(channels).plan(states).reads == (("blocks.0.0", (1, 2)),)
    assert UnitPlans(channels).removable("blocks.0.0").all()
    reasons = UnitPlans(channels).layers
    assert reasons["stem"] == "it is the first layer"
    assert reasons["fc"] == "it is a linear layer"
    assert reasons["last"] is None


def test_ranks_are_counted_on_what_is_left_of_the_layer(problem):
    channels = problem.channels
    whole = tuple(range(16))
    states = {"blocks.0.3": State(tuple(range(12)), 8, 0.0, 1), "blocks.0.0": State(whole, 14, 0.0, 1)}
    plan = UnitPlans(channels).plan(states)
    assert plan.factors == (Factorization("blocks.0.3", "svd", (8,)),)  # 14 of the 12 outputs that are left saves nothing
    applied(plan, channels)
    aligned = UnitPlans(channels, align=4).plan({"blocks.0.0": State(whole, 9, 0.0, 1)})
    assert aligned.factors == (Factorization("blocks.0.0", "svd", (12,)),)


def test_a_budget_that_cannot_be_met_says_the_closest(problem):
    with pytest.raises(BudgetError, match="compressed as far as it can be, this network has macs"):
        PublishedCC(images=100).plan(replace(problem, limits={"macs": 10.0}))
    with pytest.raises(BudgetError, match="the smallest legal network has macs"):
        CC().plan(replace(problem, limits={"macs": 10.0}))
    with pytest.raises(BudgetError, match="known are channels, ranks, depth"):
        CC("filters")
    with pytest.raises(BudgetError, match="gamma"):
        PublishedCC(gamma=-1)


@pytest.mark.parametrize(("method", "before"), [(PublishedCC(images=300), 3), (CC(compensation=SMALL), 1)])
def test_the_same_plan_with_what_was_kept_of_a_killed_search(problem, method, before):
    kept, asked = {}, []

    def once(name, work):
        if name not in kept:
            asked.append(name)
            if len(asked) == before + 1:
                raise KeyboardInterrupt
            kept[name] = json.loads(json.dumps(work()))
        return kept[name]

    with pytest.raises(KeyboardInterrupt):
        method.plan(replace(problem, once=once))
    done = len(kept)
    again = method.plan(replace(problem, once=once))
    assert done == before
    assert len(set(asked)) == len(kept)  # nothing was computed twice
    assert again == method.plan(problem)


def test_sequences_that_are_not_faster_on_the_target_are_refused(problem):
    """On a device that computes 16 channels at a time, ranks below 16 cost what 16 cost."""
    channels = problem.channels
    stairs = Target("fake", options={"step": 16, "noise": 0.001})
    factored = [Factorization("blocks.0.0", "svd", (3,)), Factorization("last", "svd", (17,))]
    plan = Plan.keep({}, channels.digest, factors=factored)
    flat = measured(channels, plan, Target("fake", options={"noise": 0.001}))
    steps = measured(channels, plan, stairs)
    assert flat["blocks.0.0"].faster
    assert flat["blocks.0.0"].changed_ms < flat["blocks.0.0"].dense_ms
    assert flat["last"].faster
    assert not steps["last"].faster  # 17 ranks cost what 32 cost
    method = CC(accept=True)
    asked = replace(problem, target=stairs, limits={"macs": 0.8 * 2 * problem.limits["macs"]})
    found = method.plan(asked)
    careless = replace(method, accept=False).plan(asked)
    assert not all(choice.faster for choice in measured(channels, careless, stairs).values()), "there is something to refuse"
    assert all(choice.faster for choice in measured(channels, found, stairs).values())


def test_a_latency_budget_is_met_and_no_slower_layer_is_chosen(problem, net, digits, tmp_path):
    target = Target("fake", options={"noise": 0.001})
    arguments = {
        "train": pairs(digits["train"]), "validate": pairs(digits["holdout"]), "budget": Budget(latency=0.9), "target": target,
        "method": CC(compensation=SMALL), "finetune": FineTune(epochs=0),
        "out": tmp_path / "run",
    }  # fmt: skip
    result = compressor.compress(net, (torch.zeros(2, 1, 8, 8),), **arguments)
    assert result.met
    assert result.latency_ratio > 0.8
    assert all(choice.faster for choice in measured(problem.channels, result.plan, target).values())
    judged = {choice.layer: choice.faster for choice in result.choices}
    assert all(judged[one.layer] for one in result.plan.factors)
    assert compressor.compress(net, (torch.zeros(2, 1, 8, 8),), **arguments).choices == result.choices


def test_what_was_refused_is_in_the_result_and_on_its_page(net, digits, tmp_path):
    method = CC(accept=True, compensation=SMALL)
    result = compressor.compress(
        net, (torch.zeros(2, 1, 8, 8),), validate=pairs(digits["holdout"]), calibrate=pairs(digits["train"]),
        budget=Budget(macs=0.8), target=Target("fake", options={"step": 16, "noise": 0.001}), method=method,
        out=tmp_path / "run",
    )  # fmt: skip
    slow = [choice for choice in result.choices if not choice.faster]
    assert slow
    assert not {choice.layer for choice in slow} & {one.layer for one in result.plan.factors}
    page = (tmp_path / "run" / "report.html").read_text()
    for choice in slow:
        assert f"<td>{choice.layer}</td><td>{choice.dense_ms:.4f} ms</td><td>{choice.changed_ms:.4f} ms</td><td>plain</td>" in page
    assert f"stay plain: {slow[0].layer}" in result.summary()


def test_compress_with_ranks_goes_the_whole_way(net, digits, tmp_path):
    arguments = {
        "train": pairs(digits["train"]), "validate": pairs(digits["holdout"]), "test": pairs(digits["test"]),
        "budget": Budget(macs=0.5), "target": Target(threads=1), "method": CC(compensation=SMALL),
        "finetune": FineTune(epochs=1), "out": tmp_path / "run",
    }  # fmt: skip
    result = compressor.compress(net, (torch.zeros(2, 1, 8, 8),), **arguments)
    assert result.plan.factors
    assert result.met
    names = [step.name for step in result.steps]
    assert names[:4] == ["original", "channels removed", "compensated", "fine-tuned"]
    assert names[4:] in ([], ["compensated, kept"]), "an epoch may be no better than the repair"
    assert result.steps[1].macs > result.steps[2].macs
    assert result.latency_of(result.steps[1]) is None
    assert sum(p.numel() for p in result.graph.parameters()) == result.steps[-1].params
    assert "layers factorized (svd)" in result.summary()
    x = digits["test"][0][:16]
    with torch.no_grad():
        expected = result.graph(x)
        for again in (compressor.load(tmp_path / "run"), compressor.load(tmp_path / "run", net)):
            torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "not measured" in page
    assert f"svd of rank {result.plan.factors[0].ranks[0]}" in page
    channels = compressor.analyze(compressor.trace(net, (torch.zeros(2, 1, 8, 8),)))
    by_layer = macs_by_layer(channels, channels.structure(result.plan))
    assert sum(by_layer.values()) == result.steps[-1].macs
    resumed = compressor.compress(net, (torch.zeros(2, 1, 8, 8),), **arguments)
    assert resumed.plan == result.plan
    assert [s.metric for s in resumed.steps] == [s.metric for s in result.steps]


def test_a_piece_is_the_layer_at_other_widths(problem):
    channels = problem.channels
    plan = Plan.keep(
        {"blocks.0.0": range(20)}, channels.digest, {"blocks.1.0": range(10)}, [Factorization("blocks.0.3", "svd", (5,))]
    )  # fmt: skip
    found = variants_of(channels, plan)
    assert found["blocks.0.3"] == Variant(20, 16, 20, ("svd", (5,)))
    assert found["blocks.1.0"] == Variant(16, 24, 10)
    assert found["blocks.0.3"].plain == Variant(20, 16, 20)
    graph = piece(channels, "blocks.0.3", found["blocks.0.3"])
    assert graph(torch.zeros(3, 20, 8, 8)).shape == (3, 16, 8, 8)
    assert sum(p.numel() for p in graph.parameters()) == 5 * (20 * 9 + 16)
    gathered = piece(channels, "blocks.1.0", found["blocks.1.0"])
    assert gathered(torch.zeros(3, 16, 8, 8)).shape == (3, 24, 8, 8)
