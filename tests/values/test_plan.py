"""Plan and Structure: frozen values that travel as JSON."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor import Plan, PlanError, Structure

names = st.text(min_size=1, max_size=12)
plans = st.dictionaries(names, st.sets(st.integers(0, 500), min_size=1, max_size=20), max_size=5)


@given(plans, st.text(max_size=64))
def test_a_plan_survives_json(kept, model):
    plan = Plan.keep(kept, model)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest == plan.digest


@given(st.dictionaries(names, st.integers(1, 4096), max_size=5))
def test_a_structure_survives_json(widths):
    structure = Structure(tuple(widths.items()))
    assert Structure.from_json(structure.to_json()) == structure


def test_indices_may_come_from_numpy_and_torch_in_any_order():
    plan = Plan.keep({"b": torch.tensor([2, 0]), "a": np.array([1])})
    assert plan.kept == (("a", (1,)), ("b", (0, 2)))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"a": []}, "`a` keeps nothing"),
        ({"a": [1, 1]}, "keeps index 1 twice"),
        ({"a": [-1]}, "keeps -1"),
        ({"a": [1.5]}, r"keeps 1\.5"),
        ({"a": [True]}, "keeps True"),
        ({"a": ["0"]}, "keeps '0'"),
    ],
)
def test_indices_that_are_none_are_named(kept, message):
    with pytest.raises(PlanError, match=message):
        Plan.keep(kept)


good = json.loads(Plan.keep({"a": [0]}).to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON, or cut off"),
        (json.dumps(good)[:-3], "not JSON, or cut off"),
        ("[1]", "should hold a JSON object"),
        (json.dumps({**good, "schema": 99}), "`schema` is 99"),
        (json.dumps({**good, "model": 3}), "field `model`"),
        (json.dumps({**good, "keep": [1]}), "field `keep`"),
        (json.dumps({**good, "keep": {"a": {"0": 1}}}), r"field `keep\['a'\]`"),
        (json.dumps({**good, "keep": {"a": [0, "x"]}}), "`a` keeps 'x'"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_wrong_truncated_and_hostile_texts_name_the_field(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_a_missing_file_and_a_bad_one_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"none\.json: cannot be read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match=r"bad\.json: plan: not JSON"):
        Plan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("widths", "message"), [({"a": 0}, "positive integer"), ({"a": True}, "positive integer"), ([], "`widths`")]
)
def test_a_structure_with_impossible_widths_is_refused(widths, message):
    with pytest.raises(PlanError, match=message):
        Structure.from_json(json.dumps({"schema": 1, "widths": widths, "ranks": {}}))
