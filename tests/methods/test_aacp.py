"""AACP: its first population, its steps and its repair."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import compressor
from compressor import BudgetError, Target
from compressor.methods import Problem
from compressor.methods import aacp as module
from compressor.methods.losses.curves import curves_of
from compressor.methods.searching.structure_vectors import Vectors
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.paths import give_back, steepest
from compressor.methods.structures.searched_widths import options_of
from compressor.passes.fitting.losses import rankable
from compressor.search.study import OUTCOME, STRUCTURE
from tests.methods.searches import SMALL, TARGET, aacp, study_of


@pytest.fixture(scope="module")
def problem(problem):
    return replace(problem, target=TARGET)


def test_the_first_member_of_the_population_is_the_allocation_dead_channels_or_not(net, problem):
    """With coarse steps a notch is due by its mean price; channels that lose nothing must not take it along."""
    own = copy.deepcopy(net)
    with torch.no_grad():
        own.blocks[0][1].weight[:2] = 0.0
        own.blocks[0][1].bias[:2] = 0.0
    channels = compressor.analyze(compressor.trace(own, (torch.zeros(2, 1, 8, 8),)))
    asked = replace(problem, channels=channels)
    options = options_of(asked, "align", frozenset(rankable(channels)[0]))
    curves = curves_of(asked, asked.calibration, SMALL, 256)
    legal = {k: options[k] for k, group in enumerate(channels.groups) if group.name in curves}
    losses = {k: curves[channels.groups[k].name] for k in legal}
    losses = {k: curve.ranking.loss[list(legal[k])] * curve.sensitivity**0.5 for k, curve in losses.items()}
    path = steepest([g.size for g in channels.groups], legal, losses, lambda rows: channels.costs.macs(rows).astype(float))
    limit = 0.5 * channels.costs.macs(path[:1])[0]
    first = int(np.argmax(channels.costs.macs(path) <= limit))
    expected = give_back(path, first, lambda rows: channels.costs.macs(rows) <= limit)
    asked = replace(asked, limits={"macs": float(limit)})
    assert channels.structure(aacp(1).plan(asked)) == channels.structure_of(expected)


def test_a_share_of_the_first_population_lies_around_the_allocations(problem, tmp_path, monkeypatch):
    fine, found = replace(problem, target=replace(problem.target, align=1)), {}
    for near in (0.0, 0.5, 1.0):
        url = f"sqlite:///{tmp_path / f'{near}.db'}"
        monkeypatch.setattr(module, "_NEAR", near)
        aacp(10, population=10).plan(replace(fine, storage=url))
        found[near] = np.array([trial.user_attrs[STRUCTURE]["widths"] for trial in study_of(url).trials])
    assert (found[0.5][:3] == found[1.0][:3]).all(), "the allocations come first"
    assert (found[0.5][5:] == found[0.0][5:]).all(), "the others are drawn"
    allocations = found[1.0][:3]
    far = {near: np.abs(rows[5:, None] - allocations).sum(2).min(1).mean() for near, rows in found.items()}
    assert far[1.0] < 0.7 * far[0.5] == 0.7 * far[0.0]


def test_searching_beats_the_first_population_and_finds_what_the_study_says(steady, tmp_path):
    problem = steady
    stored = replace(problem, storage=f"sqlite:///{tmp_path / 'study.db'}")
    plan = aacp(25).plan(stored)
    study = study_of(stored.storage)
    assert study.best_trial.number >= 5, "the population has improved on the first one"
    assert study.best_trial.user_attrs[STRUCTURE]["widths"] == [w for _, w in problem.channels.structure(plan).widths]
    assert all(t.user_attrs[OUTCOME]["images"] in (0, 300) for t in study.trials)


def test_repair_takes_steps_one_by_one_until_it_suffices(problem):
    options = [tuple(range(1, g.size + 1)) for g in problem.channels.groups]
    affordable = Affordable(problem, options, 6)
    vectors = Vectors([g.name for g in problem.channels.groups], options, affordable, fill=False)
    filling = Vectors([g.name for g in problem.channels.groups], options, affordable, fill=True)
    levels = np.array([len(own) - 1 for own in options])
    for seed in range(5):
        found = vectors.repaired(levels, np.random.default_rng(seed))
        random, expected = np.random.default_rng(seed), levels.copy()  # the released code's loop
        while not affordable.within(vectors.rows(expected[None]))[0]:
            alive = [k for k in range(len(expected)) if expected[k] > 0]
            expected[alive[int(random.integers(len(alive)))]] -= 1
        assert (found == expected).all()
        for start in (levels, levels // 4):
            filled = filling.repaired(start, np.random.default_rng(seed))
            able = [k for k in range(len(filled)) if filled[k] < levels[k]]
            wider = filled + np.eye(len(filled), dtype=np.int64)[able]
            assert affordable.within(vectors.rows(filled[None]))[0]
            assert able
            assert not affordable.within(vectors.rows(wider)).any(), "what still fits was given"
            assert (filling.repaired(filled, np.random.default_rng(seed)) == filled).all()
        assert (filled >= levels // 4).all()


def test_what_was_measured_too_slow_is_narrowed_in_the_order_of_the_allocation(problem):
    options = [tuple(range(1, g.size + 1)) if g.frozen is None else (g.size,) for g in problem.channels.groups]
    vectors = Vectors([g.name for g in problem.channels.groups], options, Affordable(problem, options, 6), fill=True)
    random = np.random.default_rng(0)
    found = np.array([random.integers(1, own[-1] + 1) if len(own) > 1 else own[-1] for own in options])
    walk = GlobalRanking(problem.channels.groups, options).walk({g.name: random.normal(size=g.size) for g in problem.channels.free})
    for walks in ([], [walk]):
        path = vectors.around(found, walks)
        assert (path[0] == [own[-1] for own in options]).all()
        assert (path[-1] == [own[0] for own in options]).all()
        assert (path == found).all(1).any()
        assert ((path[1:] <= path[:-1]).all(1) & (path[1:] < path[:-1]).any(1)).all()
    notches = np.argmax(np.diff(walk.path(), axis=0) < 0, axis=1)  # the group of each
    below = [k for at, k in enumerate(notches) if walk.path()[at + 1][k] < found[k]]
    following = int(np.flatnonzero((path == found).all(1))[0])
    assert np.argmax(np.diff(path[following:], axis=0) < 0, axis=1).tolist() == below


def test_staircase_steps_are_the_edges_on_the_target(net):
    graph = compressor.trace(net, (torch.zeros(2, 1, 8, 8),))
    channels = compressor.analyze(graph)
    kept = {}

    def once(name, work):
        return kept.setdefault(name, None) or kept.__setitem__(name, work()) or kept[name]

    target = Target("fake", align=1, options={"step": 8, "noise": 0.0})
    problem = Problem(channels, {}, target, None, None, 0, once=once)
    names = frozenset(g.name for g in channels.free)
    options = dict(zip([g.name for g in channels.groups], options_of(problem, "staircase", names), strict=True))
    inside = next(g for g in channels.free if g.size == 24)
    assert options[inside.name] == (8, 16, 24)
    assert len(kept) < len(channels.free), "groups of one shape are measured once"
    assert all(own[-1] == g.size for g, own in zip(channels.groups, options.values(), strict=True))
    with pytest.raises(BudgetError, match="no steps"):
        options_of(problem, "stairs", names)
