"""CaP: budgets and floors hold, the search is what the paper says, and bad input is told."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import compressor
from compressor import Budget, CaP, Compensation, Target
from compressor.errors import BudgetError, DataError
from compressor.methods import Problem
from compressor.methods.losses.allocation import POWERS, Allocation, Weighting
from compressor.methods.losses.curves import curves_of
from compressor.methods.losses.masked_network import Holdout, Masked
from compressor.methods.published.aacp import is_stream
from compressor.methods.published.cap import PublishedCaP
from compressor.methods.structures.paths import steepest
from compressor.methods.structures.slower_sequences import refused
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.losses import loss_curves, rankable
from compressor.passes.statistics.calibration import Calibration
from compressor.runtime.latency_model.training_engines import observe
from compressor.training.evaluate import evaluate
from compressor.values.progress import Progress
from tests.methods.digits import Net, pairs

SMALL = Compensation(images=300, positions=16)


@pytest.fixture(scope="module")
def problem(net, digits):
    graph = compressor.trace(net, (torch.zeros(1, 1, 8, 8),)).eval()
    channels = compressor.analyze(graph)
    calibration = Calibration.read([x for x, _ in pairs(digits["train"])], graph, 300)
    full = float(channels.costs(channels.widths([channels.full])).macs[0])
    return Problem(channels, {"macs": 0.5 * full}, Target("fake", align=2), None, None, 0, pairs(digits["holdout"]), calibration)


def repaired(problem, plan, settings=SMALL):
    graph = compressor.apply(plan, problem.channels.graph).eval()
    return Compensate(problem.channels, plan, problem.calibration, settings).run(graph).graph


def share(problem, graph):
    return evaluate(graph, problem.validate).value / 100


@pytest.mark.parametrize("weights", [*POWERS, "the best"])
def test_the_budget_holds_and_beats_the_plain_criterion(problem, weights):
    method = CaP(compensation=SMALL, probes=60)
    if weights in POWERS:
        plan = Allocation(problem, curves_of(problem, problem.calibration, SMALL, 60), None).decide(Weighting(weights))
    else:
        plan = method.plan(problem)
    costs = problem.costs(problem.channels.structure(plan))
    assert 0.9 * problem.limits["macs"] < costs["macs"] <= problem.limits["macs"]
    plain = compressor.Magnitude("l1", "global").plan(problem)
    bare = compressor.apply(plain, problem.channels.graph).eval()
    assert share(problem, repaired(problem, plan)) > share(problem, bare) + 0.1
    assert share(problem, problem.channels.graph) > 0.95


def test_several_budgets_hold_at_once(problem):
    full = problem.costs(problem.channels.full)
    limits = {"macs": 0.7 * full["macs"], "params": 0.4 * full["params"], "memory": 0.6 * full["memory"]}
    plan = CaP(compensation=SMALL, probes=60).plan(replace(problem, limits=limits))
    costs = problem.costs(problem.channels.structure(plan))
    assert all(costs[name] <= limit for name, limit in limits.items())


def test_streams_are_pruned_as_groups(problem):
    names = {group.name for group in problem.channels.free}
    assert {name for name in names if is_stream(problem.channels, name)} == {"stem"}
    tight = replace(problem, limits={"macs": 0.2 * problem.limits["macs"] * 2})
    assert "stem" in dict(CaP(compensation=SMALL, probes=60).plan(tight).kept)


def test_the_curve_predicts_what_compensation_leaves(problem):
    curves = loss_curves(problem.channels, problem.calibration, SMALL, probes=0, norms=False)
    group = next(g for g in problem.channels.free if g.name == "blocks.0.0")
    ranking = curves[group.name].ranking
    plan = compressor.Plan.keep({group.name: ranking.order[:10].tolist()})
    settings = replace(SMALL, features="original")
    graph = compressor.apply(plan, problem.channels.graph).eval()
    repair = Compensate(problem.channels, plan, problem.calibration, settings).run(graph).repairs[0]
    assert ranking.loss[10] / ranking.loss[0] == pytest.approx(repair.after, rel=1e-3)


def test_the_steepest_path_takes_the_cheapest_loss_per_saving():
    losses = {0: torch.tensor([9.0, 1.0, 0.0]).numpy(), 1: torch.tensor([4.0, 0.5, 0.0]).numpy()}
    rows = steepest([3, 3], {0: [1, 2, 3], 1: [1, 2, 3]}, losses, lambda rows: (rows @ [4, 1]).astype(float))
    assert rows.tolist() == [[3, 3], [2, 3], [2, 2], [1, 2], [1, 1]]


@pytest.mark.parametrize("published", [False, True])
def test_the_floor_holds_on_the_holdout_after_real_removal(problem, published):
    own = CaP(floor=0.85, compensation=SMALL, probes=60)
    method = PublishedCaP(0.85, compensation=Compensation.published(images=300, positions=16)) if published else own
    plan = method.plan(replace(problem, limits={}))
    costs, full = (problem.costs(problem.channels.structure(p)) for p in (plan, compressor.Plan.keep({})))
    assert costs["macs"] < 0.8 * full["macs"]
    assert share(problem, repaired(problem, plan, method.compensation)) >= (0.85 if published else 0.83)


def test_the_walk_to_a_floor_goes_farther_than_the_published_search(problem):
    published = PublishedCaP(0.85, compensation=Compensation.published(images=300, positions=16))
    ours, theirs = (m.plan(replace(problem, limits={})) for m in (CaP(0.85, compensation=SMALL, probes=60), published))
    assert problem.costs(problem.channels.structure(ours))["macs"] < problem.costs(problem.channels.structure(theirs))["macs"]


def test_down_to_a_floor_too_sequences_have_to_be_faster_where_that_is_asked(problem):
    stairs = replace(problem, limits={}, target=Target("fake", align=1, options={"step": 16, "noise": 0.001}))
    method = CaP(0.85, "ranks", accept=True, compensation=SMALL, probes=60)
    careless, found = (own.plan(stairs) for own in (replace(method, accept=False), method))
    slow = refused(stairs, careless, accept=True)
    assert slow
    assert not slow & {one.layer for one in found.factors}
    assert not refused(stairs, found, accept=True)


def test_masked_in_the_search_is_removed_in_the_network(problem):
    """The network that the search evaluates and the one that comes out agree image by image."""
    settings = Compensation.published(images=300, positions=16)
    names = tuple(rankable(problem.channels)[0])
    holdout = Holdout.of(problem.channels, problem.validate, 400)
    network = Masked(problem.channels, names, problem.calibration, holdout, settings, problem.seed)
    for name in network.order:
        PublishedCaP(steps=3)._decide(problem, network, name, lambda value: value >= 50)
    graph = repaired(problem, network.plan, settings)
    with torch.no_grad():
        x = problem.validate[0][0]
        assert torch.allclose(network.graph(x), graph(x), atol=2e-3)
        assert not torch.allclose(problem.channels.graph(x), graph(x), atol=0.1)


class Log(Progress):
    def __init__(self):
        self.lines = []

    def stage(self, text):
        self.lines.append(text)


def test_the_tolerated_accuracy_falls_linearly_over_the_groups(problem):
    log = Log()
    PublishedCaP(0.8, steps=2).plan(replace(problem, limits={}, progress=log))
    said = [float(line.split("at least ")[1].split(" ")[0]) for line in log.lines if "at least" in line]
    original = 100 * share(problem, problem.channels.graph)
    count = len(rankable(problem.channels)[0])
    assert said == pytest.approx([original - (k + 1) * (original - 80) / count for k in range(count)], abs=0.01)


def test_bottom_up_meets_a_budget_by_the_highest_floor(problem):
    plan = PublishedCaP(steps=2).plan(problem)
    assert problem.costs(problem.channels.structure(plan))["macs"] <= problem.limits["macs"]


def test_the_same_seed_gives_the_same_plan(problem):
    method = CaP(compensation=SMALL, probes=60)
    assert method.plan(problem) == method.plan(problem)


WRONG = {
    "an impossible budget": (
        {"limits": {"macs": 10.0}}, CaP(compensation=SMALL, probes=60), BudgetError, "smallest legal network",
    ),
    "no images": ({"calibration": None}, CaP(), DataError, "pass calibrate"),
    "no images, published": ({"calibration": None}, CaP.published(), DataError, "CaP needs images"),
    "no hold-out": ({"validate": []}, CaP(floor=0.9), DataError, "looked at on a hold-out"),
    "a floor above the original": ({}, CaP(floor=1.0), BudgetError, "the original itself has"),
    "a floor in percent": ({"limits": {}}, CaP(floor=85, compensation=SMALL, probes=60), DataError, "write 0.85 for 85 %"),
    "a floor that the budget does not allow": (
        {"limits": {"macs": 1e5}}, PublishedCaP(0.96, steps=1), BudgetError, "cannot be met with 0.96",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_told(problem, case):
    changes, method, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        method.plan(replace(problem, **changes))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(CaP, "floor", 0), (CaP, "space", "all"), (CaP, "probes", 0), (PublishedCaP, "steps", 0), (PublishedCaP, "most", 2)],
)
def test_settings_out_of_range_are_refused(kind, name, value):
    with pytest.raises(BudgetError, match=name):
        kind(**{name: value})


def test_compress_with_a_floor_needs_no_budget_and_goes_on_after_a_kill(net, digits, tmp_path):
    def run(out, progress=None):
        return compressor.compress(
            net, (torch.zeros(1, 1, 8, 8),), validate=pairs(digits["holdout"]), calibrate=pairs(digits["train"]),
            target=Target("fake"), method=CaP(floor=0.9, compensation=SMALL, probes=60), out=out, progress=progress,
        )  # fmt: skip

    class Stop(Progress):
        def stage(self, text):
            if text == "compensate" or text.startswith("accuracy: compensated"):
                raise KeyboardInterrupt(text)

    whole = run(tmp_path / "whole")
    assert [step.name for step in whole.steps] == ["original", "channels removed", "compensated"]
    assert whole.steps[-1].metric >= 88
    assert whole.repairs
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", Stop())
    again = run(tmp_path / "killed")
    assert again.plan == whole.plan
    for name, tensor in whole.graph.state_dict().items():
        assert torch.equal(tensor, again.graph.state_dict()[name]), name
    loaded = compressor.load(tmp_path / "whole", Net())
    with torch.no_grad():
        assert torch.allclose(loaded(digits["test"][0]), whole.graph(digits["test"][0]), atol=1e-5)


def test_compress_without_any_label_tells_the_agreement_with_the_original(net, digits, tmp_path):
    result = compressor.compress(
        net, (torch.zeros(1, 1, 8, 8),), calibrate=digits["train"][0].split(50), budget=Budget(macs=0.6),
        target=Target("fake", align=2), method=CaP(compensation=SMALL, probes=60), out=tmp_path / "run",
    )  # fmt: skip
    assert result.steps[0].metric == 100.0
    assert result.steps[-1].metric > result.steps[1].metric
    assert "agreement %" in result.summary()
    assert "agreement with the original" in (tmp_path / "run" / "report.html").read_text()
    assert "Compensation" in (tmp_path / "run" / "report.html").read_text()


def test_compress_asks_for_a_budget_or_a_floor(net, digits, tmp_path):
    with pytest.raises(BudgetError, match="nothing says how far to go"):
        compressor.compress(net, (torch.zeros(1, 1, 8, 8),), validate=pairs(digits["holdout"]), out=tmp_path / "run")
    with pytest.raises(DataError, match="there are no images"):
        compressor.compress(net, (torch.zeros(1, 1, 8, 8),), budget=Budget(macs=0.5), out=tmp_path / "run")


def test_a_bias_that_compensation_adds_is_counted(digits, tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, bias=False), nn.Linear(16, 10, bias=False)

        def forward(self, x):
            return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    result = compressor.compress(
        Bare(), (torch.zeros(1, 1, 8, 8),), calibrate=digits["train"][0].split(50), budget=Budget(params=0.6),
        target=Target("fake", align=2), method=CaP(compensation=SMALL, probes=60), out=tmp_path / "run",
    )  # fmt: skip
    assert result.steps[-1].params == sum(p.numel() for p in result.graph.parameters()) > result.steps[1].params
    loaded = compressor.load(tmp_path / "run", Bare())
    with torch.no_grad():
        assert torch.allclose(loaded(digits["test"][0]), result.graph(digits["test"][0]), atol=1e-5)


def test_the_latency_model_is_measured_where_the_problem_says(problem):
    """On a cluster that is the node with the device."""
    asked = []

    def observed(structures, anchor_ms):
        asked.extend(structures)
        return list(observe(problem.channels, structures, problem.target, anchor_ms=anchor_ms))

    there = replace(problem, limits={"latency": 0.9}, measure=lambda plan: SimpleNamespace(ratio=0.5), observe=observed)
    assert CaP(engines=8, probes=32).plan(there).kept
    assert len(asked) >= 8
