"""`Factorize`: one form for all layers, within a budget."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import compressor
from compressor import BudgetError, Factorize, Target
from compressor.methods import Problem
from compressor.methods.structures.paths import AIM
from compressor.passes.layers.forms import FORMS
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.latency_model.single_layers import rank_edges
from compressor.runtime.measuring.measure import Comparison
from compressor.values.plan import Factorization, Plan
from tests.methods.test_cc import measured, share_of


def limited(problem, share):
    return replace(problem, limits={"macs": share * problem.costs(problem.channels.full)["macs"]})


CASES = [(form, choice) for form in FORMS for choice in ("rate", "energy", "vbmf") if form != "cp" or choice == "rate"]


@pytest.mark.parametrize(("form", "choice"), CASES)
def test_the_budget_is_met_by_factorization_alone(problem, form, choice):
    plan = Factorize(form, choice).plan(limited(problem, 0.7))
    assert {one.form for one in plan.factors} == {form}
    assert not plan.kept
    assert 0.55 < share_of(problem, plan) <= 0.7
    found = compressor.analyze(applied(plan, problem.channels))
    assert found.costs_of(found.full).macs[0] == problem.costs(problem.channels.structure(plan))["macs"]


def test_a_looser_budget_leaves_more_of_the_energy(problem):
    x = torch.randn(16, 1, 8, 8)
    errors = []
    with torch.no_grad():
        expected = problem.channels.graph(x)
        for share in (0.9, 0.7, 0.5):
            built = applied(Factorize("svd").plan(limited(problem, share)), problem.channels)
            errors.append(float((built(x) - expected).norm() / expected.norm()))
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] > 0


def test_a_fixed_rank_is_taken_where_it_saves_something(problem):
    plan = Factorize("svd", "fixed", 4).plan(limited(problem, 0.9))
    assert {one.ranks for one in plan.factors} == {(4,)}
    assert "blocks.0.0" in {one.layer for one in plan.factors}
    with pytest.raises(BudgetError, match="by factorization alone: as far as it goes, this network has macs"):
        Factorize("svd", "fixed", 10).plan(limited(problem, 0.1))


def test_where_no_layer_can_take_the_form_each_is_named():
    graph = compressor.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.zeros(1, 3, 2, 2),))
    asked = Problem(compressor.analyze(graph), {"macs": 10.0}, Target("fake"), None, None, 0)
    with pytest.raises(BudgetError, match=r"factorized as svd \(1: it is a linear layer; 3: it is a linear layer\)"):
        Factorize("svd").plan(asked)


def test_settings_that_do_not_go_together_are_refused():
    for given, message in (
        ({"form": "qr"}, "known are svd, spatial_svd"),
        ({"choice": "fixed"}, "a positive rank goes with"),
        ({"rank": 3}, "a positive rank goes with"),
        ({"form": "cp"}, "not the rank of a matrix"),
        ({"steps": "eighths"}, "known are align, staircase"),
    ):
        with pytest.raises(BudgetError, match=message):
            Factorize(**given)


@pytest.mark.slow
def test_ranks_on_a_staircase_are_its_right_edges(problem):
    stairs = Target("fake", align=1, options={"step": 8, "noise": 0.001})
    asked = replace(limited(problem, 0.8), target=stairs)
    assert rank_edges(problem.channels, "last", "svd", 32, 1, stairs, lambda name, work: work()) == [8, 16, 24, 32]
    plan = Factorize("svd", "energy", steps="staircase", accept=False).plan(asked)
    assert plan.factors
    assert all(one.ranks[0] % 8 == 0 for one in plan.factors)
    free = Factorize("svd", "energy", accept=False).plan(asked)
    assert any(one.ranks[0] % 8 for one in free.factors)


def test_only_what_is_faster_stays_factorized(problem):
    stairs = Target("fake", options={"step": 16, "noise": 0.001})
    plan = Factorize("spatial_svd", "rate", accept=True).plan(replace(limited(problem, 0.6), target=stairs))
    found = measured(problem.channels, plan, stairs)
    assert found
    assert all(choice.faster for choice in found.values())
    ratios = [choice.changed_ms / choice.dense_ms for choice in found.values()]
    assert np.max(ratios) < 1


class Deep(torch.nn.Module):
    """Many layers that a device which computes 128 channels at once runs slower as sequences, and one that it runs faster."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.small = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(24))
        self.widen, self.large = torch.nn.Conv2d(16, 512, 1), torch.nn.Conv2d(512, 512, 3, padding=1)
        self.head = torch.nn.Linear(512, 4)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.small:
            x = torch.relu(layer(x))
        return self.head(self.large(self.widen(x)).mean((2, 3)))


def test_what_is_slower_as_a_sequence_does_not_keep_a_latency_from_being_met():
    """All layers factorized as far as it goes take longer than asked for; the large one alone does not."""
    torch.manual_seed(0)
    target = Target("fake", options={"step": 128, "noise": 0.001})
    graph = compressor.trace(Deep().eval(), (torch.zeros(1, 1, 4, 4),))
    channels = compressor.analyze(graph)
    with Comparison(graph, target, 0) as comparison:

        def measure(plan):
            found, original = comparison.measure(applied(plan, channels))
            return SimpleNamespace(ratio=found.ratio_to(original))

        large = measure(Plan.keep({}, channels.digest, factors=[Factorization("large", "svd", (128,))])).ratio
        names = ["large", "widen", *(f"small.{k}" for k in range(24))]
        every = measure(Plan.keep({}, channels.digest, factors=[Factorization(name, "svd", (1,)) for name in names])).ratio
        limit = 0.3 * large / AIM + 0.7 * every
        assert large < AIM * limit
        assert limit < every
        plan = Factorize("svd", "energy").plan(Problem(channels, {"latency": limit}, target, measure, None, 0))
    assert {one.layer for one in plan.factors} == {"large"}
