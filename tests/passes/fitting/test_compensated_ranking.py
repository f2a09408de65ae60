"""The ranking against brute force: greedy on the error that is left after compensation."""

import pytest
import torch

from compressor.passes.fitting.compensated_ranking import Reading, rank
from compressor.passes.fitting.regression import Facts, solve
from compressor.passes.statistics.moments import Moments


def layer(seed, units=6, kernel=3, outputs=4, samples=300, extra=0):
    generator = torch.Generator().manual_seed(seed)
    features = units * kernel + extra
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64) @ mixing
    moments = Moments()
    moments.add(x[:, None])
    matrix = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    columns = torch.arange(units * kernel).view(units, kernel) + extra
    return Reading(moments.covariance[0], matrix, columns)


def left(readings, kept):
    """J when these units are kept, by the closed form, summed over the layers."""
    total = 0.0
    for reading in readings:
        owned = set(reading.columns[reading.columns >= 0].tolist())
        index = [c for c in range(len(reading.covariance)) if c not in owned]
        index += [c for unit in kept for c in reading.columns[unit].tolist() if c >= 0]
        mean = torch.zeros(1, len(reading.covariance), dtype=torch.float64)
        bias = torch.zeros(1, len(reading.matrix), dtype=torch.float64)
        facts = Facts.of_layer(mean, reading.covariance[None], reading.matrix[None], bias)
        if not index:
            total += float(facts.target_variance.sum())
            continue
        own = torch.tensor([index])
        total += float(solve(facts.kept(own), reading.matrix[:, index][None], bias, ridge=1e-12).after.sum())
    return total


def greedy(readings, units):
    order = []
    while len(order) < units:
        rest = [u for u in range(units) if u not in order]
        order.append(min(rest, key=lambda u: left(readings, [*order, u])))
    return order


CASES = {
    "a convolution": [layer(0)],
    "a 1x1 convolution": [layer(1, kernel=1, units=9)],
    "several readers": [layer(2), layer(3, kernel=1), layer(4, outputs=7)],
    "other channels beside them": [layer(5, extra=5)],
}


@pytest.mark.parametrize("name", CASES)
def test_the_order_is_the_greedy_one_and_the_curve_the_loss(name):
    readings = CASES[name]
    units = len(readings[0].columns)
    found = rank(readings, units)
    assert found.order.tolist() == greedy(readings, units)
    for width in range(units + 1):
        expected = left(readings, found.order[:width].tolist())
        assert found.loss[width] == pytest.approx(expected, rel=1e-6, abs=1e-6 * found.loss[0])


def test_units_with_fewer_columns_than_others_are_ranked_alike():
    reading = layer(7, units=5, kernel=2)
    columns = reading.columns.clone()
    columns[3, 1] = -1  # this unit has one column; the other one belongs to nobody and always stays
    ragged = Reading(reading.covariance, reading.matrix, columns)
    assert rank([ragged], 5).order.tolist() == greedy([ragged], 5)


def test_dead_duplicated_and_combined_channels_come_last_and_cost_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    x[:, 2] = 0.0
    x[:, 4] = x[:, 1]
    x[:, 5] = x[:, 0] - x[:, 3]
    moments = Moments()
    moments.add(x[:, None])
    matrix = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    found = rank([Reading(moments.covariance[0], matrix, torch.arange(6)[:, None])], 6)
    assert found.loss[3] < 1e-6 * found.loss[0]
    assert found.loss[2] > 1e-3 * found.loss[0]
    assert 2 in found.order[3:].tolist()
    assert len({1, 4} & set(found.order[:3].tolist())) == 1


def test_without_readers_nothing_is_lost():
    found = rank([], 4)
    assert found.order.tolist() == [0, 1, 2, 3]
    assert found.loss.tolist() == [0.0] * 5


def test_a_target_of_its_own_counts_what_can_be_told_of_it():
    reading = layer(8)
    same = Reading(reading.covariance, reading.matrix, reading.columns, reading.matrix @ reading.covariance)
    assert rank([same], 6).order.tolist() == rank([reading], 6).order.tolist()
    deaf = Reading(reading.covariance, reading.matrix, reading.columns, torch.zeros_like(reading.matrix))
    assert rank([deaf], 6).loss[0] == 0.0
