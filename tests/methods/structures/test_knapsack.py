"""The knapsack is exact for its surrogate: as good as trying everything."""

import itertools

import numpy as np
import pytest

from compressor.methods.structures.knapsack import _BUCKETS, Knapsack, Unit, _combinations, _multiple_choice


def everything(start, options, losses, cost, limit):
    """The least loss of all structures; columns 1 and 3 are branches that hold columns 2 and 4."""
    best = np.inf
    for values in itertools.product(*options.values()):
        row = np.array(start)
        row[list(options)] = values
        if cost(row[None])[0] > limit:
            continue
        loss = 0.0
        for column, value in zip(options, values, strict=True):
            if column in (2, 4) and not row[column - 1]:
                continue  # it is gone with its branch
            loss += losses[column][options[column].index(value)]
        best = min(best, loss)
    return best


def cost(rows):
    """Of a stream (0) and two branches: as layers have it, inner width times stream width."""
    rows = rows.astype(float)
    return rows[:, 0] ** 2 + rows[:, 0] * (rows[:, 1] * (2 + 3 * rows[:, 2]) + rows[:, 3] * (1 + 2 * rows[:, 4]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.7, 1.001])
def test_as_good_as_trying_everything(seed, share):
    random = np.random.default_rng(seed)
    start = np.array([8, 1, 6, 1, 6])
    options = {0: [2, 4, 6, 8], 1: [0, 1], 2: [1, 2, 3, 4, 5, 6], 3: [0, 1], 4: [2, 4, 6]}
    losses = {k: np.sort(random.random(len(own)))[::-1] * (4 if k in (1, 3) else 1) for k, own in options.items()}
    losses = {k: own - own[-1] for k, own in losses.items()}
    limit = share * cost(start[None])[0]
    found = Knapsack(start, options, losses, [Unit(1, (2,)), Unit(3, (4,))], cost).solve(limit, [])
    best = everything(start, options, losses, cost, limit)
    assert found is not None
    assert cost(found[None])[0] <= limit
    loss = sum(float(losses[c][options[c].index(int(found[c]))]) for c in options if not (c in (2, 4) and not found[c - 1]))
    assert loss <= best + 0.02 * losses[1][0], "costs are rounded up"


def test_what_cannot_be_met_has_no_structure():
    start, options = np.array([8, 1, 6, 1, 6]), {1: [0, 1], 3: [0, 1]}
    losses = {1: np.array([1.0, 0.0]), 3: np.array([1.0, 0.0])}
    knapsack = Knapsack(start, options, losses, [Unit(1, ()), Unit(3, ())], cost)
    assert knapsack.solve(0.9 * knapsack.cheapest, []) is None
    found = knapsack.solve(knapsack.cheapest, [])
    assert found is not None
    assert list(found) == [8, 0, 6, 0, 6]


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_of_each_item_is_exact(seed):
    random = np.random.default_rng(seed)
    costs = [np.concatenate([[0], random.integers(1, 1200, 4)]).astype(float) for _ in range(4)]
    losses = [np.concatenate([[9.0], random.random(4)]) for _ in range(4)]
    picks, loss = _multiple_choice(costs, losses, float(_BUCKETS))  # a bucket is one unit of cost
    possible = [
        sum(own[k] for own, k in zip(losses, every, strict=True))
        for every in itertools.product(range(5), repeat=4)
        if sum(own[k] for own, k in zip(costs, every, strict=True)) <= _BUCKETS
    ]
    assert loss == pytest.approx(min(possible))
    assert sum(own[k] for own, k in zip(losses, picks, strict=True)) == pytest.approx(loss)


@pytest.mark.parametrize("counts", [[], [16], [16, 16], [9, 9, 9], [2] * 6, [16] * 22])
def test_combinations_stay_few_and_hold_the_widest(counts):
    found = _combinations(counts, [False] * len(counts))
    assert 1 <= len(found) <= 128
    assert tuple(count - 1 for count in counts) in found
    assert tuple(0 for _ in counts) in found


def test_every_choice_of_the_branches_within_is_there_with_widths_from_narrow_to_wide():
    found = _combinations([16] * 10 + [2, 2], [False] * 10 + [True, True])
    assert len(found) <= 128
    for there in itertools.product((0, 1), repeat=2):
        own = [one for one in found if one[-2:] == there]
        assert {(0,) * 10, (15,) * 10} <= {one[:-2] for one in own}


@pytest.mark.parametrize("seed", range(5))
def test_a_branch_within_another_goes_alone_or_with_it(seed):
    """Outer branch 0 with a width 1 and a branch 2 that has width 3: against every structure that there is."""
    random = np.random.default_rng(seed)
    options = {0: [0, 1], 1: [1, 2, 3], 2: [0, 1], 3: [1, 2]}
    losses = {
        0: [9 * random.random(), 0],
        2: [3 * random.random(), 0],
        1: [*np.sort(random.random(2))[::-1], 0],
        3: [random.random(), 0],
    }
    losses = {k: np.array(own) for k, own in losses.items()}

    def cost(rows):
        there, width, inner, inside = rows.T
        return (1 + there * (4 * width + inner * (2 + 3 * inside))).astype(float)

    knapsack = Knapsack(np.array([1, 3, 1, 2]), options, losses, [Unit(0, (1, 2, 3))], cost)
    every = np.array(list(itertools.product(*options.values())))

    def loss(row):
        if not row[0]:
            return losses[0][0]
        within = losses[1][options[1].index(row[1])]
        return within + (losses[3][options[3].index(row[3])] if row[2] else losses[2][0])

    for limit in (1.0, 6.0, 10.0, 14.0, 25.0):
        found = knapsack.solve(limit, [])
        fitting = [row for row, spent in zip(every.tolist(), cost(every), strict=True) if spent <= limit]
        assert cost(found[None])[0] <= limit
        assert loss(found.tolist()) == pytest.approx(min(loss(row) for row in fitting), abs=0.02)
