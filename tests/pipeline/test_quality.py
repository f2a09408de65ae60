"""Budgets of quality and fronts: the fastest network within a drop, and one network for every tenth."""

import json
from dataclasses import replace

import pytest

from compressor import Budget, BudgetError, CaP, FineTune, LeGR, Magnitude
from compressor.methods import default_method
from compressor.pipeline.quality import SHARES, fastest_within
from compressor.search.fitness import Fitness
from tests.pipeline.test_compress import run, whole  # noqa: F401 - a fixture

NOTHING = FineTune(epochs=0)


def attempts(whole, lost):  # noqa: F811
    """Networks that lose so many points each, and are the faster the higher their number; None is out of reach."""
    asked = []

    def attempt(k):
        asked.append(k)
        if lost[k] is None:
            return None
        last = replace(whole.steps[-1], metric=whole.steps[0].metric - lost[k])
        faster = replace(whole.compressed, times_ms=tuple(ms * 0.9**k for ms in whole.compressed.times_ms))
        return replace(whole, steps=(*whole.steps[:-1], last), compressed=faster)

    return attempt, asked


@pytest.mark.parametrize(("lost", "drop", "found"), [
    ([0, 0.5, 1, 2, 3], 1, 2), ([0, 0, 0, 0, 0], 0, 4), ([1, 2, 3, 4, 5], 1, 0), ([0, 1, 2, None, None], 5, 2),
])  # fmt: skip
def test_the_fastest_within_the_drop_is_found_in_few_networks(whole, lost, drop, found):  # noqa: F811
    attempt, asked = attempts(whole, lost)
    chosen, made = fastest_within(drop, whole.steps[0].metric, len(lost), attempt)
    assert chosen.budget["drop"] == (pytest.approx(lost[found]), drop)
    assert chosen.met
    assert len(asked) == len(set(asked)) <= 3
    assert [one.latency_ratio for one in made] == sorted((one.latency_ratio for one in made), reverse=True)


def test_a_drop_that_no_network_keeps_says_what_the_nearest_loses(whole):  # noqa: F811
    attempt, _ = attempts(whole, [2.5, 3, 4])
    with pytest.raises(BudgetError, match=r"loses at most 1 points; the nearest, at 0\.\d+ of the latency, loses 2\.50"):
        fastest_within(1, whole.steps[0].metric, 3, attempt)
    with pytest.raises(BudgetError, match=r"loses at most 1 points$"):
        fastest_within(1, whole.steps[0].metric, 3, lambda k: None)


def test_a_drop_is_kept_and_the_run_goes_on(tmp_path):
    arguments = {"budget": Budget(drop=40.0), "finetune": NOTHING}
    result = run(tmp_path / "run", **arguments)
    lost, allowed = result.budget["drop"]
    assert allowed == 40.0
    assert lost == pytest.approx(result.steps[0].metric - result.steps[-1].metric)
    assert result.met == (lost <= 40.0)
    assert result.met
    assert set(result.budget) == {"drop"}, "latencies asked for on the way are no bounds of the user's"
    assert 2 <= len(result.members) <= 5
    assert result.test is not None
    assert all(one.test is None for one in result.members), "the test images are for the network that is chosen"
    assert all(one.latency_ratio >= result.latency_ratio for one in result.members if one.met)
    chosen = next(one for one in result.members if one.plan == result.plan)
    assert (tmp_path / "run" / "model.onnx").resolve() == (chosen.path / "model.onnx").resolve()
    assert "fastest within the drop" in result.summary()
    again = run(tmp_path / "run", **arguments)
    assert again.to_dict() == result.to_dict()
    with pytest.raises(BudgetError, match="no network was found that loses at most 0 points"):
        run(tmp_path / "other", budget=Budget(drop=0.0, params=0.05), finetune=NOTHING)


def test_a_front_has_a_network_for_every_tenth_as_far_down_as_that_goes(tmp_path):
    result = run(tmp_path / "run", budget=Budget(front="macs"), finetune=NOTHING, align=1)
    shares = [one.steps[-1].macs / one.steps[0].macs for one in result.members]
    assert len(shares) >= 5
    assert all(share <= asked for share, asked in zip(shares, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), strict=False))
    front = json.loads((tmp_path / "run" / "result.json").read_text())["front"]
    assert [point["macs_ratio"] for point in front] == shares
    assert [point["folder"] for point in front] == [f"front/{k}" for k in range(len(shares))]
    assert result.plan == result.members[-1].plan
    text = (tmp_path / "run" / "report.html").read_text()
    assert text.count("front/") >= len(shares)
    narrow = run(tmp_path / "narrow", budget=Budget(front="latency"), finetune=NOTHING, align=16)
    assert 1 <= len(narrow.members) < 7, "with few widths the front ends early"
    assert run(tmp_path / "narrow", budget=Budget(front="latency"), finetune=NOTHING, align=16).to_dict() == narrow.to_dict()


def test_a_search_is_made_once_for_a_drop(tmp_path):
    searching = LeGR(trials=4, population=2, fitness=Fitness("none", holdout=16))
    result = run(tmp_path / "run", budget=Budget(drop=60.0), finetune=NOTHING, method=searching, align=1)
    assert result.met
    assert len({path.name for path in (tmp_path / "run").glob("study*.db")}) == 1
    assert len(list((tmp_path / "run" / "front").iterdir())) > len(result.members), "plans of all tenths are from one search"


def test_by_default_what_was_measured_to_be_best_decides():
    assert default_method(Budget(latency=0.5), images=True) == CaP(space="channels+depth")
    assert default_method(Budget(drop=1.0), images=True) == CaP(space="channels+depth")
    assert default_method(Budget(front="latency"), images=True) == CaP(space="channels+depth")
    assert default_method(Budget(macs=0.5), images=True) == CaP(space="channels+ranks+depth")
    assert default_method(Budget(latency=0.5), images=False) == Magnitude()
    assert SHARES[0] < 1
