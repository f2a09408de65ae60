"""What a search for a latency ends with: the best candidate that is measured to meet it, widened; else the best, narrowed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from compressor import Target
from compressor.errors import BackendError
from compressor.methods.searching.final_plan import row_of, select_measured
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.paths import Widths
from compressor.methods.structures.searched_widths import options_of
from compressor.methods.structures.slower_sequences import refused
from compressor.search.study import STRUCTURE
from tests.methods.searches import TARGET, aacp, legr, study_of, unfilled


@pytest.fixture(scope="module")
def problem(steady):
    return replace(steady, target=TARGET)


@pytest.mark.parametrize("method", [legr, aacp])
def test_the_best_candidate_that_is_measured_to_meet_the_latency_is_the_result(problem, tmp_path, method):
    asked = []

    def measure(plan):
        asked.append(plan)
        if len(asked) == 1:
            raise BackendError("no engine")
        return SimpleNamespace(ratio=0.68)

    url = f"sqlite:///{tmp_path / 'study.db'}"
    plan = method(12, engines=8, leaders=100).plan(replace(problem, limits={"latency": 0.7}, measure=measure, storage=url))
    judged = sorted((t for t in study_of(url).trials if t.value is not None), key=lambda t: t.value)
    assert len(asked) == 2
    assert plan == asked[1]
    structures = [[width for _, width in problem.channels.structure(own).widths] for own in asked]
    assert structures == list({tuple(row_of(trial)): row_of(trial).tolist() for trial in judged}.values())[:2], "each is built once"


def test_candidates_that_must_be_as_slow_as_one_that_was_measured_are_passed_over(problem):
    """Every engine takes a fifth longer than the model says."""
    legal = options_of(problem, "align", frozenset(group.name for group in problem.channels.free))
    rows = [np.array([own[-1] for own in legal])]
    for k in np.tile(np.arange(len(legal)), 4):  # notch by notch
        narrower = [w for w in legal[k] if w < rows[-1][k]]
        rows += [np.where(np.arange(len(legal)) == k, narrower[-1], rows[-1])] if narrower else []
    affordable = Affordable(replace(problem, limits={"latency": 1.0}), legal, 8)
    guesses = affordable.costs(np.stack(rows))["latency"]
    limit, asked = 1.02 * float(guesses[0]), []

    def measure(plan):
        asked.append([width for _, width in problem.channels.structure(plan).widths])
        return SimpleNamespace(ratio=1.2 * float(affordable.costs(np.array(asked[-1:]))["latency"][0]))

    affordable.problem = replace(problem, limits={"latency": limit}, measure=measure)
    found = [optuna.trial.create_trial(value=0.0, user_attrs={STRUCTURE: {"widths": row.tolist()}}) for row in rows]
    scores, paths = {g.name: np.arange(g.size, dtype=float) for g in problem.channels.groups}, []

    def space(trial):
        return Widths(affordable.problem, scores)

    def path(trial):
        paths.append(trial)
        return np.stack(rows)

    twice = [trial for trial in found for _ in range(2)]  # as other samplers propose them
    best, plan = select_measured(affordable, twice, space, path, fill=False, widen=False)
    able = [k for k, guess in enumerate(guesses) if 1.2 * guess <= 0.985 * limit * (1 + affordable.model.error.median)]
    quarter = max(len(rows) // 4, 5)
    assert 1 < able[0] < quarter
    assert asked[:2] == [rows[0].tolist(), rows[able[0]].tolist()]
    assert [width for _, width in problem.channels.structure(plan).widths] == asked[-1] == row_of(best).tolist()
    affordable.problem = replace(affordable.problem, limits={"latency": 0.6 * limit})
    asked.clear()
    best, plan = select_measured(affordable, twice[: 2 * quarter], space, path, fill=False)
    assert best is paths[-1] is found[0], "none of the best can be fast enough: the best one is narrowed"
    assert measure(plan).ratio <= 0.6 * limit


@pytest.mark.parametrize("method", [legr, unfilled, aacp], ids=["legr", "legr, nothing undone", "aacp"])
def test_a_candidate_that_leaves_some_of_the_latency_is_widened(problem, method):
    """Engines turn out to be faster than the model knows."""
    asked, full = [], float(problem.channels.costs_of(problem.channels.full).macs[0])

    def measure(plan):
        asked.append(problem.channels.structure(plan))
        return SimpleNamespace(ratio=0.7 * float(problem.channels.costs_of(asked[-1]).macs[0]) / full)

    plan = method(12, engines=8, leaders=100).plan(replace(problem, limits={"latency": 0.6}, measure=measure))
    best, found = (np.array([width for _, width in own.widths]) for own in (asked[0], problem.channels.structure(plan)))
    assert measure(plan).ratio <= 0.6
    assert measure(plan).ratio > 0.95 * 0.6
    assert (found >= best).all()
    assert (found > best).any()


@pytest.mark.parametrize("method", [legr, aacp])
def test_where_no_candidate_meets_the_latency_as_measured_the_best_is_narrowed(problem, tmp_path, method):
    """What was judged best is too slow: the path goes on from there."""
    url, asked = f"sqlite:///{tmp_path / 'study.db'}", []
    full = float(problem.channels.costs_of(problem.channels.full).macs[0])

    def share_of(structure):
        return 1.1 * float(problem.channels.costs_of(structure).macs[0]) / full

    def measure(plan):
        asked.append(problem.channels.structure(plan))
        return SimpleNamespace(ratio=0.61 if asked[-1] in asked[:5] else share_of(asked[-1]))

    limits = {"latency": 0.6, "macs": 0.6 * full}
    plan = method(12, engines=8, leaders=100).plan(replace(problem, limits=limits, measure=measure, storage=url))
    judged = [t.user_attrs[STRUCTURE]["widths"] for t in study_of(url).trials if t.value is not None]
    found = problem.channels.structure(plan)
    assert len(asked) > 5
    assert len(set(asked[:5])) == 5
    assert all([width for _, width in own.widths] in judged for own in asked[:5])
    assert found not in asked[:5]
    assert 0.3 < share_of(found) <= 0.6


@pytest.mark.parametrize("method", [legr, aacp])
def test_a_sequence_of_the_result_has_to_be_faster_where_that_is_asked_for(problem, method):
    """On a device that computes 32 channels at once two small layers take as long as two large ones."""
    asked = replace(problem, target=Target("fake", align=4, options={"step": 32, "noise": 0.001}))
    found = {accept: method(space="channels+ranks", accept=accept).plan(asked) for accept in (True, False)}
    slow = refused(asked, found[False], accept=True)
    assert slow
    assert not slow & {one.layer for one in found[True].factors}
    assert not refused(asked, found[True], accept=True)
    for plan in found.values():
        own = problem.channels.structure(plan)
        left = [group.name for group in problem.channels.free if dict(own.widths)[group.name] < group.size]
        wider = [replace(own, widths=tuple((name, width + 4 * (name == k)) for name, width in own.widths)) for k in left]
        costs = [asked.costs(one)["macs"] for one in (own, *wider)]
        assert costs[0] <= asked.limits["macs"] < min(costs[1:]), "both use the budget: no group affords a notch more"
    assert method(space="channels+ranks").plan(asked) == found[False], "of MACs alone nobody asks for it"
