"""One of each kind of extension, as small as it can be, and how it is tested; `CONTRIBUTING.md` says where each goes."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import optuna
import pytest
import torch

import compressor
from compressor import Factorization, Plan, Target
from compressor.methods.base import MethodSettings, Problem
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.meets_budget import meets
from compressor.methods.structures.paths import Widths, fitting
from compressor.passes.criteria import CRITERIA, FilterCriterion
from compressor.passes.labels.labeler import Value
from compressor.passes.labels.rules import RULES, rule
from compressor.passes.layers.forms import FORMS
from compressor.passes.layers.forms.svd import SVD
from compressor.runtime.backends import BACKENDS, Workload
from compressor.runtime.backends.fake import Fake
from compressor.search.samplers import PopulationSampler
from compressor.values import target as targets
from tests.networks import Net, Residual, check_effective, conv, end, first_output, head, randomize

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def graph():
    return compressor.trace(randomize(Residual()), (X,))


def problem_of(graph, share=0.5):
    channels = compressor.analyze(graph)
    limit = share * float(channels.costs_of(channels.full).macs[0])
    return Problem(channels, {"macs": limit}, Target("fake", align=1), None, None, 0)


def test_an_op_rule():
    """An op without a rule freezes what it touches; with one, channels behind it go, and removed = masked."""

    @torch.library.custom_op("extension::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    net = randomize(Net(lambda m, x: end(m, m.b(torch.ops.extension.twice(m.a(x)))), a=conv(3, 12), b=conv(12, 8), fc=head(8)))
    before = compressor.analyze(compressor.trace(net, (X,)))
    assert any("extension" in op for op in before.unknown)
    try:

        @rule(torch.ops.extension.twice)
        def twice_rule(call, labeler):
            x = call.tensor("x")
            return Value(call.outputs[0], x.axes, x.why)

        check_effective(net, (X,))
    finally:
        RULES.pop(torch.ops.extension.twice, None)


def test_a_criterion(graph, monkeypatch):
    """The filters with the largest single weight stay."""

    @dataclass(frozen=True)
    class Largest(FilterCriterion):
        def of_filters(self, scoring, slot):
            return scoring.rows(slot).abs().amax(1)

    monkeypatch.setitem(CRITERIA, "largest", Largest)
    with torch.no_grad():
        weight = graph.get_submodule("conv1").weight
        weight[:] = 0.5
        weight[[1, 4]] = 0.0
        weight[[1, 4], 0, 0, 0] = 1.0
    largest, sums = (
        dict(compressor.Magnitude(by, "uniform").plan(problem_of(graph, 0.3)).kept)["conv1"] for by in ("largest", "l1")
    )
    assert {1, 4} <= set(largest)
    assert not {1, 4} & set(sums)


def test_a_factorized_form(graph, monkeypatch):
    """At full rank the sequence is the layer; costs are those of what is built."""

    class Renamed(SVD):
        name = "renamed"

    monkeypatch.setitem(FORMS, "renamed", Renamed())
    layer = graph.get_submodule("conv1")
    full = min(layer.out_channels, layer.in_channels * 9)
    for rank, exact in ((full, True), (2, False)):
        plan = Plan.keep({}, factors=[Factorization("conv1", "renamed", (rank,))])
        built = compressor.apply(plan, graph).eval()
        assert torch.allclose(first_output(built, X), first_output(graph.eval(), X), atol=1e-4) == exact
        found, channels = compressor.analyze(built), compressor.analyze(graph)
        assert found.costs_of(found.full).macs == channels.costs_of(channels.structure(plan)).macs


def test_a_back_end(graph, monkeypatch):
    """Its engine gives PyTorch's outputs, its options are checked, and it is timed like any other."""

    class Own(Fake):
        options: ClassVar[dict[str, object]] = {**Fake().options, "flavour": 1.0}

    monkeypatch.setitem(BACKENDS, "own", Own)
    monkeypatch.setitem(targets._known, "own", Own)
    with pytest.raises(compressor.BackendError, match="no option `taste`"):
        Target("own", options={"taste": 1})
    with BACKENDS["own"]().build(Workload((X,), graph=graph.eval()), Target("own", options={"flavour": 2.0})) as engine:
        assert np.allclose(engine.run([X.numpy()])[0], first_output(graph, X).numpy(), atol=1e-5)
    assert compressor.profile(graph, Target("own")).median_ms > 0


@dataclass(frozen=True)
class FirstChannels(MethodSettings):
    """Keeps the first channels of every group, narrowed in the order of the groups."""

    name: ClassVar[str] = "first-channels"
    compensation: None = None

    def plan(self, problem):
        groups = problem.channels.groups
        rows = [[group.size for group in groups]]
        for k, group in enumerate(groups):
            for width in widths(group, problem.target.align)[-2::-1]:
                rows.append([*rows[-1][:k], width, *rows[-1][k + 1 :]])
        scores = {group.name: -np.arange(group.size, dtype=float) for group in groups}
        return fitting(Widths(problem, scores), np.array(rows))


def test_a_method(graph, tmp_path):
    """It meets the budget, the same seed gives the same plan, and `compress` runs it."""
    problem = problem_of(graph)
    plan = FirstChannels().plan(problem)
    assert meets(problem, plan)
    assert plan == FirstChannels().plan(problem)
    assert all(kept == tuple(range(len(kept))) for _, kept in plan.kept)
    with pytest.raises(compressor.BudgetError, match="smallest legal network"):
        FirstChannels().plan(replace(problem, limits={"macs": 1.0}))
    images = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(2)]
    result = compressor.compress(
        graph, (X,), validate=images, budget=compressor.Budget(macs=0.5), target=problem.target, method=FirstChannels(),
        out=tmp_path / "run",
    )  # fmt: skip
    assert result.plan == plan
    assert result.met


def test_a_sampler():
    """It reads the study and keeps nothing: a second one with the same seed goes on where the first one stopped."""

    class Nearby(PopulationSampler):
        def draw(self, past, space, again=0):
            good = sorted(past.finished, key=past.loss)
            if not good:
                return self.first(past.index, space, again), {}
            random = self.random(past.index, again=again)
            return {name: float(np.clip(good[0].params[name] + random.normal(0, 0.1), 0, 1)) for name in space}, {}

    space = {"x": optuna.distributions.FloatDistribution(0, 1)}

    def tried(*counts):
        study = optuna.create_study()
        for count in counts:
            study.sampler = Nearby(3, space=space)
            study.optimize(lambda trial: (trial.suggest_float("x", 0, 1) - 0.7) ** 2, n_trials=count)
        return [trial.params["x"] for trial in study.trials]

    assert tried(40) == tried(15, 25)
    assert min(abs(x - 0.7) for x in tried(40)) < 0.05
