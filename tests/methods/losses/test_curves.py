"""Loss curves are computed once, and only what is asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import compressor
from compressor.methods.losses.curves import curves_of
from compressor.passes.channels.search_space import ranks_of
from compressor.passes.fitting.settings import Compensation

SMALL = Compensation(images=200, positions=8)


class Kept:
    """What a run does with what is computed."""

    def __init__(self):
        self.records, self.computed = {}, []

    def __call__(self, name, work):
        if name not in self.records:
            self.computed.append(name)
            self.records[name] = work()
        return self.records[name]


@pytest.fixture
def kept(problem):
    once = Kept()
    return replace(problem.over(ranks=True), once=once), once


def test_a_curve_falls_from_all_that_a_group_is_worth_to_nothing(kept):
    problem, _ = kept
    curves = curves_of(problem, problem.calibration, SMALL, 32)
    sizes = {group.name: group.size for group in problem.channels.groups}
    assert set(curves) <= set(sizes)
    assert {axis.name for axis in ranks_of(problem.channels)} <= set(curves)
    for name, curve in curves.items():
        assert len(curve.ranking.loss) == sizes[name] + 1
        assert (np.diff(curve.ranking.loss) <= 1e-9).all()
        assert curve.ranking.loss[-1] == pytest.approx(0, abs=1e-9)
        assert sorted(curve.ranking.order.tolist()) == list(range(sizes[name]))


def test_what_was_kept_is_what_was_computed(kept):
    problem, once = kept
    first, second = (curves_of(problem, problem.calibration, SMALL, 32) for _ in range(2))
    assert len(once.computed) == 2
    for name, curve in first.items():
        assert curve.sensitivity == second[name].sensitivity
        np.testing.assert_array_equal(curve.ranking.order, second[name].ranking.order)
        np.testing.assert_array_equal(curve.ranking.loss, second[name].ranking.loss)


def test_other_weights_images_and_settings_are_other_curves(kept, net):
    problem, once = kept
    curves_of(problem, problem.calibration, SMALL, 0)
    curves_of(problem, problem.calibration.after(50), SMALL, 0)
    curves_of(problem, problem.calibration, replace(SMALL, positions=7), 0)
    other = compressor.trace(net, (torch.zeros(2, 1, 8, 8),))
    other.get_submodule("last").weight.data *= 1.1
    curves_of(replace(problem, channels=compressor.analyze(other)), problem.calibration, SMALL, 0)
    assert len(set(once.computed)) == 7


def test_ranks_alone_cost_no_curves_of_channels(kept):
    problem, once = kept
    found = curves_of(problem, problem.calibration, SMALL, 0, groups=False)
    assert set(found) == {axis.name for axis in ranks_of(problem.channels)}
    assert len(once.computed) == 1
