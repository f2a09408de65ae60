"""Budget: fractions and absolute values with units."""

import pytest

from compressor import Budget, BudgetError


def test_limits_are_absolute_or_shares_of_the_original():
    budget = Budget(latency="2 ms", macs=0.5, params="400k", memory="1.5 MiB")
    assert budget.limits({"macs": 100.0}) == {"latency": 2.0, "macs": 50.0, "params": 400e3, "memory": 1.5 * 2**20}
    assert Budget(latency="250us").limits({}) == {"latency": 0.25}
    assert Budget(macs=1).limits({"macs": 7.0}) == {"macs": 7.0}


@pytest.mark.parametrize("bound", [0, 0.0, -0.5, 1.01, 60_000_000, float("nan"), True, None.__class__])
def test_numbers_outside_of_a_share_are_refused(bound):
    with pytest.raises(BudgetError, match=r"above 0 and at most 1.*'60M'"):
        Budget(macs=bound)


@pytest.mark.parametrize("text", ["", "ms", "2", "2 MB", "-2 ms", "0 ms", "1.2.3 ms", "nan ms", "2 ms please"])
def test_texts_without_a_number_and_a_unit_are_refused(text):
    with pytest.raises(BudgetError, match="'2 ms'"):
        Budget(latency=text)


def test_an_empty_budget_is_refused():
    with pytest.raises(BudgetError, match="at least one of"):
        Budget()


def test_a_front_is_a_family_of_every_tenth():
    budget = Budget(front="latency")
    assert [member.bounds for member in budget.members] == [{"latency": share} for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)]
    assert budget.to_dict() == {"front": "latency"}
    with pytest.raises(BudgetError, match="ask its members"):
        _ = budget.bounds


def test_a_drop_is_no_bound_of_costs_and_others_hold_besides():
    budget = Budget(drop=1.0, params=0.5)
    assert budget.members == (budget,)
    assert budget.limits({"params": 100.0}) == {"params": 50.0}
    assert budget.to_dict() == {"params": 0.5, "drop": 1.0}


@pytest.mark.parametrize(("bounds", "message"), [
    ({"drop": -1.0}, "points of accuracy"), ({"drop": "1 %"}, "points of accuracy"), ({"drop": True}, "points of accuracy"),
    ({"drop": 1.0, "latency": 0.5}, "what is looked for"), ({"drop": 1.0, "macs": [0.5, 0.6]}, "what is looked for"),
    ({"front": "speed"}, "over one of latency, macs"), ({"front": "latency", "macs": 0.5}, "without another bound"),
])  # fmt: skip
def test_goals_that_do_not_go_together_are_refused(bounds, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**bounds)
