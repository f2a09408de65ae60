"""What a search may afford: a latency model that leaders correct, and that refuses nothing by itself."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from compressor import BudgetError
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.searched_widths import options_of
from compressor.passes.fitting.losses import rankable
from tests.methods.searches import TARGET, aacp, legr


@pytest.fixture(scope="module")
def problem(problem):
    return replace(problem, target=TARGET)


def test_a_latency_model_that_leaders_find_too_hopeful_is_corrected(problem):
    asked = replace(problem, limits={"latency": 0.7})
    options = options_of(asked, "align", frozenset(rankable(asked.channels)[0]))
    affordable = Affordable(asked, options, 8)
    rows = np.array([[own[max(len(own) - back, 0)] for own in options] for back in (2, 3, 4, 5)])

    def learn(row, factor):
        """A leader takes so many times what the model says."""
        structure = asked.channels.structure_of(row)
        blocks = [list(pair) for pair in affordable.model.observations[0].blocks_ms]
        affordable.learn({
            "widths": dict(structure.widths), "median_ms": factor * affordable.model(structure),
            "reference_ms": affordable.model.reference_ms, "blocks_ms": blocks,
        })  # fmt: skip

    learn(rows[0], 1.2)
    assert affordable.correction == 1.0, "one tells nothing"
    learn(rows[1], 1.1)
    assert affordable.correction == pytest.approx(1.15, rel=1e-6)
    learn(rows[2], 1.15)
    assert affordable.correction == pytest.approx(1.15, rel=1e-6)
    plain = affordable.model.predict(rows) / affordable.model.reference_ms
    assert affordable.costs(rows)["latency"] == pytest.approx(1.15 * plain)
    learn(rows[3], 3.0)
    learn(rows[0], 3.0)
    assert affordable.correction == 1.25, "a disturbed engine does not close the search"


def test_a_leader_that_another_machine_measured_is_read_by_its_ratio(problem):
    asked = replace(problem, limits={"latency": 0.7})
    found = []
    for factor in (1.0, 2.0):  # a machine that takes twice as long for everything
        affordable = Affordable(asked, options_of(asked, "align", frozenset(rankable(asked.channels)[0])), 8)
        structure = asked.channels.structure_of(np.array([group.size // 2 for group in asked.channels.groups]))
        blocks = [[name, factor * ms] for name, ms in affordable.model.observations[2].blocks_ms]
        affordable.learn({
            "widths": dict(structure.widths), "median_ms": factor * 0.4 * affordable.model.reference_ms,
            "reference_ms": factor * affordable.model.reference_ms, "blocks_ms": blocks,
        })  # fmt: skip
        found.append(affordable.model(structure))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("method", [legr, aacp])
def test_leaders_that_take_longer_than_any_budget_do_not_end_the_search(problem, method, monkeypatch):
    """Every engine is slower than the model says, and the budget is one that only the narrowest networks meet: it has to go on."""
    measured = Affordable.measured

    def slower(self, structure):
        record = measured(self, structure)
        return {**record, "median_ms": 1.25 * record["median_ms"]}

    monkeypatch.setattr(Affordable, "measured", slower)
    legal = options_of(problem, "align", frozenset(group.name for group in problem.channels.free))
    affordable = Affordable(replace(problem, limits={"latency": 1.0}), legal, 8)
    narrowest = np.array([[own[0] for own in legal]])
    limit = 1.1 * float(affordable.costs(narrowest)["latency"][0])
    stored = replace(problem, limits={"latency": limit}, measure=lambda plan: SimpleNamespace(ratio=0.9 * limit))
    plan = method(16, engines=8, leaders=4).plan(stored)
    assert plan.kept


@pytest.mark.parametrize("method", [legr, aacp])
def test_a_latency_is_not_refused_by_what_the_model_says_of_it(problem, method):
    legal = options_of(problem, "align", frozenset(group.name for group in problem.channels.free))
    affordable = Affordable(replace(problem, limits={"latency": 1.0}), legal, 8)
    limit = 0.9 * float(affordable.costs(np.array([[own[0] for own in legal]]))["latency"][0])
    asked = replace(problem, limits={"latency": limit}, measure=lambda plan: SimpleNamespace(ratio=0.9 * limit))
    assert method(6, engines=8).plan(asked).kept, "its engine is faster than the model says"
    slower = replace(asked, measure=lambda plan: SimpleNamespace(ratio=1.234 * limit))
    with pytest.raises(BudgetError, match=f"latency {1.234 * limit:.3g} \\(asked: latency {limit:.3g}\\)"):
        method(6, engines=8).plan(slower)
