"""Channels and ranks in one space: rows, costs, plans, losses and latencies agree with what is built."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import compressor
from compressor import AACP, BudgetError, Compensation, Fitness, LeGR, Target
from compressor.methods.published.aacp import PublishedAACP
from compressor.methods.published.legr import PublishedLeGR
from compressor.methods.searching.loss_ranking import singular_values
from compressor.methods.structures.legal_widths import widths
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.search_space import SearchSpace, ranks_of
from compressor.passes.fitting.rank_losses import rank_curves
from compressor.passes.fitting.settings import Compensation as Settings
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.latency_model.blocks import blocks_of, widths_in
from compressor.runtime.latency_model.model import LatencyModel
from compressor.runtime.latency_model.training_engines import observe, plan_of, spread
from compressor.runtime.measuring.store import MeasurementStore
from tests.methods.conftest import digits, net, problem  # noqa: F401 - fixtures
from tests.methods.test_cc import share_of
from tests.passes.transforms.test_factorize_conv import residual

SMALL = Compensation(images=200, positions=8)
QUICK = Fitness("compensate", holdout=200, images=100)


@pytest.fixture(scope="module")
def ranked():
    return SearchSpace.of(compressor.analyze(residual()))


def rows_of(ranked, count=40, seed=0):
    random = np.random.default_rng(seed)
    columns = [random.choice(widths(group, 1), count) for group in ranked.groups]
    return np.stack(columns, axis=1)


def test_there_is_an_axis_for_every_layer_that_could_save_something(ranked):
    assert [axis.layer for axis in ranked.ranks] == ["a", "b", "down"]
    assert ranked.groups[: len(ranked.plain.groups)] == ranked.plain.groups
    assert not set(ranked.free) & set(ranked.ranks)
    assert ranks_of(ranked.plain) == ()
    by_layer = {axis.layer: axis for axis in ranked.ranks}
    assert by_layer["a"].size == 12
    assert by_layer["a"].largest == (12 * 72 - 1) // (72 + 12)
    assert widths(by_layer["a"], 1)[-2:] == (10, 12)
    assert widths(by_layer["a"], 4) == (4, 8, 12)
    assert widths(by_layer["a"], 1, [3, 6, 11, 12]) == (3, 6, 12)


def test_costs_of_rows_are_those_of_the_networks_that_are_built(ranked):
    rows = rows_of(ranked, 12)
    costs = ranked.costs(rows)
    np.testing.assert_array_equal(ranked.costs.macs(rows), costs.macs)
    kinds = set()
    for k, row in enumerate(rows):
        structure = ranked.structure_of(row)
        built = compressor.analyze(applied(plan_of(ranked.plain, structure), ranked.plain))
        own = built.costs_of(built.full)
        assert (costs.macs[k], costs.params[k], costs.memory_bytes[k]) == (own.macs[0], own.params[0], own.memory_bytes[0])
        assert ranked.costs_of(structure).macs[0] == own.macs[0]
        kinds.add(len(structure.ranks))
    assert len(kinds) > 1  # some layers are sequences in some rows


def test_rows_and_structures_are_the_same(ranked):
    for row in rows_of(ranked, 20, seed=1):
        structure = ranked.structure_of(row)
        (again,) = ranked.widths([structure])
        assert ranked.structure_of(again) == structure
        plan = plan_of(ranked, structure)
        assert ranked.structure(plan) == structure
    assert ranked.full == ranked.plain.full
    assert ranked.structure_of(ranked.widths([ranked.full])[0]) == ranked.full


def test_the_loss_of_a_rank_is_measured_on_the_output(ranked):
    torch.manual_seed(0)
    images = Calibration.read([(torch.randn(32, 3, 8, 8),) for _ in range(4)], ranked.graph, 128)
    curves = rank_curves(ranked, ranked.ranks, images, Settings(images=128, positions=10**6), probes=32)
    assert set(curves) == {axis.name for axis in ranked.ranks}
    for axis in ranked.ranks:
        loss = curves[axis.name].ranking.loss
        assert len(loss) == axis.size + 1
        assert (np.diff(loss) <= 1e-9).all()
        assert loss[-1] == 0
        assert curves[axis.name].sensitivity > 0
    x = torch.cat([batch[0] for batch in images.batches])
    down = ranked.graph.get_submodule("down")
    read = torch.relu(ranked.graph.get_submodule("stem")(x))
    y = down(read).detach().double().movedim(1, -1).reshape(-1, 16)
    values = torch.linalg.eigvalsh(torch.cov(y.T, correction=0)).flip(0)[:8]
    found = curves["down:svd:0"].ranking.loss
    np.testing.assert_allclose(found[:8], values.flip(0).cumsum(0).flip(0).numpy(), rtol=1e-3)


def test_blocks_are_there_as_the_layer_or_as_its_stages(ranked):
    blocks = blocks_of(ranked)
    names = [block.name for block in blocks]
    assert names == ["stem", "a", "a.0", "a.1", "b", "b.0", "b.1", "down", "down.0", "down.1", "head"]
    row = ranked.widths([ranked.full])[0]
    row[[g.name for g in ranked.groups].index("a:svd:0")] = 5
    found = dict(zip(names, widths_in(ranked, blocks, row[None])[0].tolist(), strict=True))
    assert found["a"] == [0, 0]
    assert found["a.0"] == [8, 5]
    assert found["a.1"] == [5, 12]
    assert found["b"] == [12, 16]
    assert found["b.0"] == [0, 0]


def test_the_latency_model_knows_sequences(ranked, tmp_path):
    target = Target("fake", options={"noise": 0.001})
    rows = spread([widths(group, 1) for group in ranked.groups], 30, 0)
    structures = [ranked.structure_of(row) for row in rows]
    store = MeasurementStore(tmp_path / "latency.sqlite")
    found = list(observe(ranked, structures, target, store=store))
    assert any(own.structure.ranks for own in found)
    for own in found:
        stages = {name for name, _ in own.blocks_ms if name.endswith((".0", ".1"))}
        assert {name.partition(".")[0] for name in stages} == {name.partition(":")[0] for name, _ in own.structure.ranks}
    model = LatencyModel(ranked, found)
    unseen = [ranked.structure_of(row) for row in rows_of(ranked, 6, seed=9)]
    for own in observe(ranked, unseen, target, store=store, anchor_ms=model.reference_ms):
        assert model(own.structure) == pytest.approx(own.median_ms, rel=0.05)


def test_singular_values_are_scores(problem):  # noqa: F811
    ranked = SearchSpace.of(problem.channels)
    found = singular_values(ranked)
    assert set(found) == {axis.name for axis in ranked.ranks}
    for axis in ranked.ranks:
        assert len(found[axis.name]) == axis.size
        assert (np.diff(found[axis.name]) <= 1e-12).all()
    assert singular_values(problem.channels) == {}


@pytest.mark.parametrize(
    "method",
    [
        LeGR(8, QUICK, population=4, space="channels+ranks", compensation=SMALL),
        PublishedLeGR(8, QUICK, population=4, space="channels+ranks", compensation=SMALL),
        AACP(8, QUICK, steps="align", population=4, space="channels+ranks", compensation=SMALL),
        PublishedAACP(8, QUICK, population=4, space="channels+ranks", compensation=SMALL),
    ],
    ids=["legr-loss", "legr-norm", "aacp-loss", "aacp-l1"],
)
def test_searches_over_channels_and_ranks_meet_the_budget(problem, method):  # noqa: F811
    full = problem.costs(problem.channels.full)["macs"]
    plan = method.plan(replace(problem, limits={"macs": 0.5 * full}))
    assert plan.kept or plan.factors
    assert 0.3 < share_of(problem, plan) <= 0.5  # eighths are coarse
    built = compressor.analyze(applied(plan, problem.channels))
    assert built.costs_of(built.full).macs[0] == problem.costs(problem.channels.structure(plan))["macs"]
    assert method.plan(replace(problem, limits={"macs": 0.5 * full})) == plan


def test_ranks_are_searched_where_channels_alone_do_not_suffice(problem, monkeypatch):  # noqa: F811
    monkeypatch.setattr("compressor.methods.published.legr._QUOTA", 0.7)
    method = PublishedLeGR(8, QUICK, population=4, space="channels+ranks", compensation=SMALL)
    full = problem.costs(problem.channels.full)["macs"]
    asked = replace(problem, limits={"macs": 0.45 * full})
    with pytest.raises(BudgetError, match="cannot be met"):
        replace(method, space="channels").plan(asked)
    assert method.plan(asked).factors


def test_an_axis_is_a_group_of_singular_values(ranked):
    axis = ranked.ranks[0]
    assert isinstance(axis, RankAxis)
    assert axis.granularity == 1
    assert axis.quota(axis.cells[0], 5) == 5
