"""Options of the command as settings of a method."""

from dataclasses import replace

import pytest

from compressor import AACP, CC, BudgetError, CaP, Compensation, Factorize, Fitness, LeGR
from compressor.cli.method_options import OPTIONS, method_of
from compressor.methods import METHODS

NOTHING = dict.fromkeys({option for options in OPTIONS.values() for option in options})


@pytest.mark.parametrize("name", METHODS)
def test_without_options_a_method_is_as_python_makes_it(name):
    assert method_of(name, NOTHING) == METHODS[name]()
    fewer = method_of(name, NOTHING, images=300)
    assert fewer.compensation == Compensation(images=300)
    assert replace(fewer, compensation=Compensation()) == METHODS[name]()


@pytest.mark.parametrize(("name", "published"), [
    ("legr", LeGR.published()), ("aacp", AACP.published()), ("cap", CaP.published()), ("cc", CC.published()),
])  # fmt: skip
def test_as_published(name, published):
    assert method_of(name, NOTHING, (), published=True, images=None) == published


def test_options_and_settings_reach_their_fields():
    found = method_of(
        "legr", {**NOTHING, "trials": 40, "fitness": "train"}, ["fitness.steps=20", "fitness.learning_rate=1", "probes=64"]
    )
    assert found == LeGR(40, Fitness("train", steps=20, learning_rate=1.0), probes=64)
    found = method_of("aacp", {**NOTHING, "trials": 40}, ["fitness.holdout=500"], published=True)
    assert found == replace(AACP.published(40), fitness=Fitness("recalibrate", "metric", holdout=500))
    assert method_of("aacp", {**NOTHING, "steps": "align"}) == AACP(steps="align")
    assert method_of("legr", NOTHING, ["compensation=none", "population=none"]) == LeGR(compensation=None)
    assert method_of("cc", {**NOTHING, "units": "ranks"}, ["gamma=0.5"], published=True) == replace(
        CC.published(), units="ranks", gamma=0.5
    )
    assert method_of("cc", NOTHING, ["accept=false"]) == CC(accept=False)
    assert method_of("factorize", {**NOTHING, "ranks": "fixed"}, ["rank=8"]) == Factorize(choice="fixed", rank=8)
    assert method_of("factorize", {**NOTHING, "form": "cp", "steps": "staircase"}) == Factorize("cp", "rate", steps="staircase")
    assert method_of("cap", {**NOTHING, "floor": 0.9}, ["compensation.ridge=0.01"]).compensation.ridge == 0.01


@pytest.mark.parametrize(("name", "given", "settings", "published", "message"), [
    ("legr", {"units": "both"}, [], False, "--units is an option of cc, not of legr"),
    ("magnitude", {"space": "channels"}, [], False, "--space is an option of cap and cc and legr and aacp, not of magnitude"),
    ("factorize", {}, [], True, "nothing was published as factorize; there are aacp, cap, cc, legr"),
    ("legr", {}, ["probes"], False, "write setting=value"),
    ("legr", {}, ["probe=1"], False, "there is no such setting; legr has trials, fitness"),
    ("legr", {}, ["fitness.step=1"], False, "`fitness` of legr has repair, objective"),
    ("legr", {}, ["probes=much"], False, "a whole number is expected, such as 256"),
    ("legr", {}, ["trials=2.5"], False, "a whole number is expected, such as 400"),
    ("legr", {}, ["compensation.ridge=much"], False, "a number or none is expected"),
    ("legr", {}, ["population=many"], False, "a whole number or none is expected"),
    ("cap", {}, ["accept=0"], False, "true or false or none is expected"),
    ("legr", {}, ["fitness=train"], False, "it has settings of its own; write fitness.NAME=value"),
    ("legr", {}, ["compensation=1"], False, "settings of its own, or is none; write compensation.NAME=value"),
    ("cc", {}, ["compensation.images=9"], True, "`compensation` of cc has none"),
    ("cc", {}, ["gamma=11"], True, "must lie between 0 and 10"),
])  # fmt: skip
def test_what_does_not_go_is_said(name, given, settings, published, message):
    with pytest.raises(BudgetError, match=message):
        method_of(name, {**NOTHING, **given}, settings, published)
