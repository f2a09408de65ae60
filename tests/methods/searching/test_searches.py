"""LeGR and AACP as methods: budgets hold, families come from one search, leaders are measured, killed runs go on."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import AACP, Budget, BudgetError, Compensation, FineTune, Fitness, LeGR
from compressor.errors import BackendError, DataError
from compressor.methods import METHODS
from compressor.methods.published.aacp import PublishedAACP, is_stream
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.legal_widths import widths
from compressor.search.storage import claim
from compressor.search.study import OUTCOME, Search
from tests.methods.digits import pairs
from tests.methods.searches import QUICK, TARGET, aacp, legr, study_of


@pytest.fixture(scope="module")
def problem(problem):
    return replace(problem, target=TARGET)


@pytest.mark.parametrize("method", [
    legr(), legr(sampler="tpe"), replace(LeGR.published(9), population=4), replace(LeGR.published(9, steps=3), population=4),
    replace(LeGR.published(9), population=4, fitness=QUICK), aacp(), aacp(sampler="random"), aacp(sampler="cmaes"),
    aacp(sampler="nsgaii"), aacp(parallel=3), replace(AACP.published(12), population=5),
], ids=lambda method: f"{type(method).__name__}-{method.sampler}-{method.fitness.repair}")  # fmt: skip
def test_every_variant_meets_the_budget_on_legal_widths(problem, method):
    plan = method.plan(problem)
    structure = problem.channels.structure(plan)
    costs = problem.costs(structure)
    assert costs["macs"] <= problem.limits["macs"]
    assert costs["macs"] >= 0.75 * problem.limits["macs"], "far more was removed than asked for"
    if method.name == "legr":
        for group in problem.channels.free:
            assert dict(structure.widths)[group.name] in widths(group, 4)
    if type(method) is PublishedAACP:
        assert not any(is_stream(problem.channels, name) for name, _ in plan.kept)
    assert method.plan(problem) == plan, "the same seed, the same search"


def test_several_budgets_at_once(problem):
    full = problem.channels.costs_of(problem.channels.full)
    limits = {"macs": 0.6 * float(full.macs[0]), "params": 0.4 * float(full.params[0]), "memory": 0.5 * float(full.memory_bytes[0])}
    for method in (legr(), aacp()):
        found = problem.costs(problem.channels.structure(method.plan(replace(problem, limits=limits))))
        assert all(found[name] <= limit for name, limit in limits.items())


@pytest.mark.parametrize("method", [legr(24), aacp(24)], ids=["legr", "aacp"])
def test_no_trial_is_spent_on_a_network_that_was_judged_before(problem, tmp_path, method, monkeypatch):
    problem, images = replace(problem, target=replace(problem.target, align=1)), []
    for distinct in (False, True):
        url = f"sqlite:///{tmp_path / f'{distinct}.db'}"
        monkeypatch.setattr(type(method), "distinct", distinct)
        method.plan(replace(problem, storage=url))
        images.append(sum(t.user_attrs[OUTCOME]["images"] > 0 for t in study_of(url).trials))
    assert images[0] < images[1] >= 23, "a network may come out of the last repair twice"


def run(net, digits, tmp_path, method, budget, train=None, **more):
    return compressor.compress(
        net, (torch.zeros(2, 1, 8, 8),), validate=pairs(digits["holdout"]), train=train or pairs(digits["train"]), budget=budget,
        target=TARGET, method=method, finetune=FineTune(epochs=0), out=tmp_path, **more,
    )  # fmt: skip


@pytest.mark.parametrize("method", [legr(10, engines=8, leaders=4), aacp(10, engines=8, leaders=4)], ids=["legr", "aacp"])
def test_a_latency_budget_is_met_as_measured_and_leaders_teach_the_model(net, digits, tmp_path, method):
    result = run(net, digits, tmp_path / "run", method, Budget(latency=0.9))
    assert result.latency_ratio <= 0.9 * 1.01
    study = study_of(f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    leaders = {name: record for name, record in study.user_attrs.items() if name.startswith("leader:")}
    assert set(leaders) == {"leader:4", "leader:8"}
    assert all(record["median_ms"] > 0 for record in leaders.values())
    assert leaders["leader:4"]["widths"] != leaders["leader:8"]["widths"], "what was measured before teaches nothing"
    assert run(net, digits, tmp_path / "run", method, Budget(latency=0.9)).plan == result.plan


def test_a_leader_that_another_process_measures_is_left_to_it(problem, tmp_path, monkeypatch):
    measured, own = [], Affordable.measured
    monkeypatch.setattr(Affordable, "measured", lambda self, structure: measured.append(structure) or own(self, structure))
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19]
    counts = []
    for somebody in (sleeper.pid, 2**22 + 1):  # one that lives, one that does not
        who = {**claim(), "pid": somebody, "started": started}
        asked = replace(problem, limits={"latency": 0.8}, storage=f"sqlite:///{tmp_path / f'{somebody}.db'}")
        quick = replace(asked, measure=lambda plan: SimpleNamespace(ratio=0.79))
        monkeypatch.setattr(Search, "run", lambda self, who=who: self.study.set_user_attr("measuring:4", who) or searched(self))
        measured.clear()
        legr(6, engines=8, leaders=4).plan(quick)
        counts.append(len(measured))
    sleeper.kill()
    sleeper.communicate()
    assert counts == [0, 1]


searched = Search.run


def test_a_family_is_compressed_exported_and_measured_member_by_member(net, digits, tmp_path):
    budget = Budget(macs=[0.8, 0.5])
    result = run(net, digits, tmp_path / "run", legr(8), budget)
    assert [m.budget["macs"][1] for m in result.members] == sorted((m.budget["macs"][1] for m in result.members), reverse=True)
    assert result.plan == result.members[1].plan
    assert all(member.met for member in result.members)
    assert "front/1" in result.summary()
    for k, member in enumerate(result.members):
        folder = tmp_path / "run" / "front" / str(k)
        for name in ("plan.json", "weights.safetensors", "network.safetensors", "model.onnx", "measurement.json", "result.json"):
            assert (folder / name).exists(), name
        loaded = compressor.load(folder, net)
        x = digits["test"][0][:8]
        assert torch.allclose(loaded(x), member.graph(x), atol=1e-5)
    again = run(net, digits, tmp_path / "run", legr(8), budget)
    assert [m.plan for m in again.members] == [m.plan for m in result.members]


def test_a_family_by_a_method_that_searches_for_each(net, digits, tmp_path):
    result = run(net, digits, tmp_path / "run", aacp(6), Budget(macs=[0.7, 0.5]))
    assert [member.met for member in result.members] == [True, True]
    assert len(optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 'run' / 'study.db'}")) == 2


def test_a_storage_that_others_use_keeps_networks_and_data_apart(problem, net, digits, tmp_path):
    stored = replace(problem, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    first = aacp(6).plan(stored)
    assert aacp(6).plan(stored) == first
    assert len(optuna.get_all_study_summaries(stored.storage)) == 1
    aacp(6).plan(replace(stored, validate=list(stored.validate)[::-1]))
    assert len(optuna.get_all_study_summaries(stored.storage)) == 2


def test_test_data_is_looked_at_only_in_the_end(net, digits, tmp_path):
    seen = []

    class Test:
        def __iter__(self):
            seen.append((tmp_path / "run" / "front" / "0" / "model.onnx").exists())
            return iter(pairs(digits["test"]))

    run(net, digits, tmp_path / "run", aacp(6), Budget(macs=0.5), test=Test())
    assert seen == [True, True], "the original and the result, once each, when everything is decided"


class Flipping:
    """Batches that an augmentation draws from Python's generator, or from NumPy's."""

    def __init__(self, batches, draw):
        self.batches, self.draw = batches, draw

    def __iter__(self):
        return iter([(x.flip(3) if self.draw() < 0.5 else x, y) for x, y in self.batches])


def shuffled(digits):
    return DataLoader(TensorDataset(*digits["train"]), 50, shuffle=True, generator=torch.Generator().manual_seed(7))


DRAWN = {
    "fixed": lambda digits: pairs(digits["train"]),
    "python": lambda digits: Flipping(pairs(digits["train"]), random.random),
    "numpy": lambda digits: Flipping(pairs(digits["train"]), np.random.rand),
    "own generator": shuffled,
}


@pytest.mark.parametrize("data", DRAWN)
def test_a_run_interrupted_while_it_searches_ends_with_the_same_plan_in_the_same_process(net, digits, tmp_path, monkeypatch, data):
    loader = DRAWN[data](digits)

    class Killed(BaseException):
        pass

    from compressor.search.fitness import Judge

    judged, original = [], Judge.__call__

    def counting(self, plan):
        judged.append(plan)
        return original(self, plan)

    monkeypatch.setattr(Judge, "__call__", counting)
    whole = run(net, digits, tmp_path / "whole", aacp(12), Budget(macs=0.5), train=loader)
    distinct, half = len(judged), len(judged) // 2
    judged.clear()

    def dying(self, plan):
        judged.append(plan)
        if len(judged) == half:
            raise Killed
        return original(self, plan)

    monkeypatch.setattr(Judge, "__call__", dying)
    with pytest.raises(Killed):
        run(net, digits, tmp_path / "run", aacp(12), Budget(macs=0.5), train=loader)
    again = run(net, digits, tmp_path / "run", aacp(12), Budget(macs=0.5), train=loader)
    assert again.plan == whole.plan
    assert judged[half - 1] == judged[half], "the trial under way is judged again, with the same parameters"
    assert len(judged) == distinct + 1


def test_other_images_under_the_same_search_are_said(problem, tmp_path, caplog):
    url, method = f"sqlite:///{tmp_path / 'study.db'}", aacp(6)
    first = replace(problem, storage=url)
    method.plan(first)
    method.plan(first)
    assert "on other images" not in caplog.text
    method.plan(replace(first, validate=[(x.flip(3), y) for x, y in problem.validate]))
    assert "holds 6 trials of the same search on other images" in caplog.text


def test_the_fitness_has_as_many_images_as_it_asks_for(net, digits, tmp_path):
    method = aacp(5, fitness=Fitness("recalibrate", holdout=100, images=300), compensation=Compensation(images=200, positions=8))
    run(net, digits, tmp_path / "run", method, Budget(macs=0.5))
    trials = study_of(f"sqlite:///{tmp_path / 'run' / 'study.db'}").trials
    assert {t.user_attrs[OUTCOME]["images"] for t in trials if "same_as" not in t.user_attrs[OUTCOME]} == {400}


def test_what_cannot_be_is_told_before_anything_is_searched(problem, net, digits, tmp_path):
    with pytest.raises(BudgetError, match="smallest"):
        aacp().plan(replace(problem, limits={"macs": 10.0}))
    with pytest.raises(DataError, match="needs images"):
        legr().plan(replace(problem, calibration=None))
    with pytest.raises(BudgetError, match=r"sampler='bayes'\): known are legr, "):
        legr(sampler="bayes")
    with pytest.raises(BudgetError, match="at least 4 members"):
        aacp(population=2)
    with pytest.raises(BudgetError, match="population, samples, generations"):
        legr(population=0)
    with pytest.raises(BudgetError, match="trials=0"):
        aacp(0)
    with pytest.raises(BudgetError, match="only one bound may be"):
        Budget(macs=[0.5, 0.3], latency=[0.5])
    with pytest.raises(BackendError, match=r"no Ray cluster at"):
        run(net, digits, tmp_path / "run", legr(), Budget(macs=0.5), cluster="127.0.0.1:1")


def test_settings_are_plain_data():
    for name in METHODS:
        json.dumps(METHODS[name]().to_dict())


@pytest.mark.parametrize("method", [LeGR, AACP])
def test_ours_with_the_settings_of_the_paper_is_not_taken_for_it(method):
    """Runs and studies are told apart by these: they rank by other things."""
    paper = method.published(20)
    own = {key: getattr(paper, key) for key in ("trials", "fitness", "compensation", "population")}
    ours = method(**own).to_dict()
    assert paper.to_dict()["published"]
    assert "published" not in ours
    assert {**ours, "published": True} == {**paper.to_dict(), **({"steps": "staircase"} if method is AACP else {})}
