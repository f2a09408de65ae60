"""The latency model against engines that it has not seen, on a synthetic clock with a staircase, and once for real."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import compressor
from compressor.methods.structures.legal_widths import widths
from compressor.passes.channels.search_space import SearchSpace
from compressor.runtime.latency_model.blocks import blocks_of, times_by_block, widths_in
from compressor.runtime.latency_model.model import LatencyModel, Observation
from compressor.runtime.latency_model.training_engines import observe, plan_of, spread, train_latency_model
from compressor.runtime.measuring.measure import built
from compressor.runtime.measuring.store import MeasurementStore
from compressor.runtime.timing.protocol import Protocol
from tools.cifar_resnet import resnet20

QUICK = Protocol(warm_up_s=0.02, settle_s=0.1, min_samples=30, max_samples=200, max_s=2.0)


@pytest.fixture(scope="module")
def channels():
    torch.manual_seed(0)
    return compressor.analyze(compressor.trace(resnet20().eval(), (torch.randn(1, 3, 32, 32),)))


def structures(channels, rows):
    names = [group.name for group in channels.groups]
    return [compressor.Structure(tuple(zip(names, row.tolist(), strict=True))) for row in rows]


def options(channels, align):
    return [widths(group, align) for group in channels.groups]


@pytest.mark.parametrize("step", [1, 8])
def test_it_predicts_engines_that_it_has_not_seen(channels, tmp_path, step):
    target = compressor.Target("fake", options={"noise": 0.02, "step": step})
    store = MeasurementStore(tmp_path / "latency.sqlite")
    model = train_latency_model(channels, options(channels, 1), target, engines=24, protocol=QUICK, store=store)
    rows = spread(options(channels, 1), 22, seed=7)[2:]
    seen = list(observe(channels, structures(channels, rows), target, QUICK, store, anchor_ms=model.reference_ms))
    measured, predicted = np.array([o.median_ms for o in seen]), model.predict(rows)
    assert np.median(np.abs(predicted / measured - 1)) < 0.03
    assert spearmanr(measured, predicted).statistic > 0.98
    assert model.error.median < 0.03
    assert model(seen[0].structure) == pytest.approx(predicted[0])
    low, high = model.interval(seen[0].structure)
    assert low < predicted[0] < high


def test_engines_in_the_store_are_not_built_again(channels, tmp_path, monkeypatch):
    target, store = compressor.Target("fake"), MeasurementStore(tmp_path / "latency.sqlite")
    first = train_latency_model(channels, options(channels, 8), target, engines=8, protocol=QUICK, store=store)
    assert len(store) == 8

    def refuse(*arguments, **keywords):
        raise AssertionError("an engine was built")

    monkeypatch.setattr("compressor.runtime.measuring.measure.built", refuse)
    again = train_latency_model(channels, options(channels, 8), target, engines=8, protocol=QUICK, store=store)
    assert again.observations == first.observations


def test_an_engine_that_is_measured_improves_the_model(channels, tmp_path):
    target, store = compressor.Target("fake", options={"noise": 0.001}), MeasurementStore(tmp_path / "latency.sqlite")
    model = train_latency_model(channels, options(channels, 8), target, engines=8, protocol=QUICK, store=store)
    rows = spread(options(channels, 8), 4, seed=3)[2:]
    for one in observe(channels, structures(channels, rows), target, QUICK, store, anchor_ms=model.reference_ms):
        before = abs(model(one.structure) / one.median_ms - 1)
        model = model.observed(one)
        assert abs(model(one.structure) / one.median_ms - 1) <= before + 1e-3
    assert len(model.observations) == 10


def test_without_layer_times_whole_engines_are_enough(channels):
    """A back end that does not tell its layers: latency is a known function of the widths here."""
    blocks = blocks_of(channels)

    def latency(rows):
        found = widths_in(channels, blocks, rows).astype(float)
        return 0.5 + 1e-4 * (found[:, :, 0] * found[:, :, 1]).sum(axis=1) + 1e-3 * found[:, :, 1].sum(axis=1)

    rows = spread(options(channels, 4), 40, seed=0)
    seen = [Observation(s, float(ms), 1.0) for s, ms in zip(structures(channels, rows), latency(rows), strict=True)]
    model = LatencyModel(channels, seen)
    unseen = spread(options(channels, 4), 30, seed=1)
    assert np.abs(model.predict(unseen) / latency(unseen) - 1).max() < 0.02


def test_widths_of_blocks_are_those_of_the_narrowed_network(channels):
    from compressor.passes.transforms.remove_channels import RemoveChannels

    rows = spread(options(channels, 4), 5, seed=5)
    for row, structure in zip(rows, structures(channels, rows), strict=True):
        small = RemoveChannels(plan_of(channels, structure), channels)(channels.graph).graph
        found = widths_in(channels, blocks_of(channels), row[None])[0]
        for block, (reads, makes) in zip(blocks_of(channels), found.tolist(), strict=True):
            weight = small.get_parameter(f"{block.name}.weight")
            assert (makes, reads) == tuple(weight.shape[:2]), block.name


def test_the_layers_of_a_real_engine_belong_to_blocks(channels):
    import contextlib

    with contextlib.ExitStack() as stack:
        engine = built(stack, channels.graph, compressor.Target())
        times, rest = times_by_block(blocks_of(channels), engine.layers(runs=10))
    assert set(times) == {block.name for block in blocks_of(channels)}
    assert rest < 0.3 * sum(times.values())  # a fifth as a rule: zero-padded shortcuts, the pool, the change of layout


def test_the_stages_of_a_real_engine_are_those_of_the_structure(channels, tmp_path):
    """A layer that is a sequence is timed as its two stages, under their names, and not as itself."""
    ranked = SearchSpace.of(channels)
    rows = spread([widths(group, 4) for group in ranked.groups], 3, seed=1)
    store = MeasurementStore(tmp_path / "latency.sqlite")
    blocks = blocks_of(ranked)
    for found in observe(ranked, [ranked.structure_of(row) for row in rows], compressor.Target(), QUICK, store):
        there = widths_in(ranked, blocks, ranked.widths([found.structure]))[0].all(axis=1)
        assert {name for name, _ in found.blocks_ms} == {block.name for block, own in zip(blocks, there, strict=True) if own}
    assert any(block.instead_of for block, own in zip(blocks, there, strict=True) if own)


def test_thousands_of_structures_at_once(channels, tmp_path):
    target, store = compressor.Target("fake"), MeasurementStore(tmp_path / "latency.sqlite")
    model = train_latency_model(channels, options(channels, 8), target, engines=8, protocol=QUICK, store=store)
    rows = spread(options(channels, 8), 10_000, seed=1)
    assert model.predict(rows).shape == (10_000,)


def test_too_few_engines_are_refused(channels):
    with pytest.raises(compressor.BackendError, match="at least 6 measured engines, found 0"):
        LatencyModel(channels, [])
