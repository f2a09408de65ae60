"""Settings are of the types and within the ranges that are asked for, and what is wrong is said before anything is computed."""

import json
import math

import numpy as np
import pytest

from compressor import AACP, BudgetError, CaP, Compensation, DataError, Factorize, FineTune, Fitness, LeGR, Magnitude
from compressor.methods.published.cc import PublishedCC


@pytest.mark.parametrize(("settings", "message"), [
    (lambda: PublishedCC(share="a"), r"PublishedCC\(share='a'\): a number is expected, such as 0.01"),
    (lambda: PublishedCC(images=2.5), r"PublishedCC\(images=2.5\): a whole number is expected, such as 10000"),
    (lambda: PublishedCC(gamma=math.nan), r"PublishedCC\(gamma=nan\): must lie between 0 and 10"),
    (lambda: CaP(probes=True), "a whole number is expected"),
    (lambda: CaP(floor="high"), "a number or none is expected"),
    (lambda: CaP(space="all"), "known are channels, ranks, depth, channels"),
    (lambda: Factorize(accept="yes"), "true or false or none is expected, such as None"),
    (lambda: Factorize(compensation=Fitness()), r"Compensation\(…\) or none is expected"),
    (lambda: Magnitude(7), "known are l1"),
    (lambda: LeGR(trials=0), r"LeGR\(trials=0\): must be at least 1"),
    (lambda: LeGR(fitness="none"), r"Fitness\(…\) is expected"),
    (lambda: LeGR(population=2.0), "a whole number or none is expected"),
    (lambda: AACP(steps=None), "known are staircase, align"),
    (lambda: AACP(population=None), "a whole number is expected, such as 10"),
])  # fmt: skip
def test_a_method_says_what_is_wrong_with_a_setting(settings, message):
    with pytest.raises(BudgetError, match=message):
        settings()


@pytest.mark.parametrize("settings", [
    lambda: Fitness(holdout="all"), lambda: Fitness(images=7), lambda: FineTune(epochs=0.5), lambda: FineTune(momentum=2),
    lambda: Compensation(rescale=1), lambda: Compensation(ridge="small"), lambda: Compensation(features="some"),
])  # fmt: skip
def test_and_so_do_the_settings_of_repairs(settings):
    with pytest.raises(DataError, match=r"is expected|must|known are"):
        settings()


def test_whatever_is_a_number_will_do_and_can_be_written():
    settings = PublishedCC(images=np.int64(100), share=np.float32(0.5))
    assert json.loads(json.dumps(settings.to_dict()))["images"] == 100
    assert PublishedCC(images=np.int64(100), share=np.float32(0.5), gamma=1) == PublishedCC(images=100, share=0.5, gamma=1.0)
    assert LeGR(population=None).population is None
