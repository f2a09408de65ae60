"""The walk down a global ranking is the released code's loop, only faster; costs alone are the costs together."""

import numpy as np
import pytest
import torch

import compressor
from compressor import Budget, Target
from compressor.errors import BudgetError
from compressor.methods import LeGR, Problem
from compressor.methods.published.legr import NormRanking
from compressor.methods.structures.global_ranking import GlobalRanking
from compressor.methods.structures.legal_widths import widths
from compressor.methods.structures.paths import Widths
from compressor.passes.criteria import select
from tests.methods.digits import Net
from tests.networks import randomize


@pytest.fixture(scope="module")
def channels():
    return compressor.analyze(compressor.trace(randomize(Net()), (torch.zeros(2, 1, 8, 8),)))


def released(channels, scores, limit, least):
    """LeGR's loop: filter after filter from the lowest score, each layer keeping its quota, costs computed anew every time."""
    groups = {group.name: group for group in channels.groups}
    entries = sorted((score, name, unit) for name, own in scores.items() for unit, score in enumerate(own))
    kept = {name: set(range(groups[name].size)) for name in scores}
    for _, name, unit in entries:
        structure = channels.structure(compressor.Plan.keep({n: sorted(k) for n, k in kept.items()}))
        if channels.costs_of(structure).macs[0] <= limit:
            break
        if len(kept[name]) > least(groups[name]):
            kept[name].discard(unit)
    return {name: sorted(own) for name, own in kept.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_the_walk_is_the_loop_of_the_released_code(channels, seed, share):
    random = np.random.default_rng(seed)
    scores = {group.name: random.random(group.size) for group in channels.free}
    limit = share * float(channels.costs_of(channels.full).macs[0])

    def least(group):
        return max(int(np.ceil(0.1 * group.size)), 2)

    options = [[w for w in widths(g, 1) if w >= least(g)] if g.frozen is None else [g.size] for g in channels.groups]
    walk = GlobalRanking(channels.groups, options).walk(scores)
    row = walk.first(lambda rows: channels.costs.macs(rows) <= limit)
    found = {
        group.name: select(group, scores[group.name], int(width))
        for group, width in zip(channels.groups, row, strict=True) if group.frozen is None
    }  # fmt: skip
    assert found == released(channels, scores, limit, least)
    path = walk.path()
    assert (path[int(np.argmax(channels.costs.macs(path) <= limit))] == row).all()


def test_walks_over_legal_widths_stop_on_them_only(channels):
    random = np.random.default_rng(0)
    scores = {group.name: random.random(group.size) for group in channels.free}
    options = [widths(group, 8) for group in channels.groups]
    path = GlobalRanking(channels.groups, options).walk(scores).path()
    for k, own in enumerate(options):
        assert set(path[:, k]) == set(own), "every legal width is passed, and no other"
    assert (np.diff(path, axis=0) <= 0).all()
    assert ((np.diff(path, axis=0) != 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_is_filled_as_by_undoing_one_notch_after_another(channels, seed):
    random = np.random.default_rng(seed)
    scores = {group.name: random.random(group.size) for group in channels.free}
    walk = GlobalRanking(channels.groups, [widths(group, 4) for group in channels.groups]).walk(scores)
    limit = random.uniform(0.2, 0.9) * float(channels.costs.macs(walk.path()[:1])[0])

    def within(rows):
        return channels.costs.macs(rows) <= limit

    path = walk.path()
    first = int(np.argmax(within(path)))
    expected = path[first].copy()
    for before in range(first - 1, -1, -1):
        column = int(np.argmax(path[before] != path[before + 1]))
        wider = expected.copy()
        wider[column] = path[before][column]
        if path[before + 1][column] == expected[column] and within(wider[None])[0]:
            expected = wider
    assert (walk.filled(within) == expected).all()
    assert (walk.first(within) == path[first]).all()


def test_macs_alone_are_those_of_all_costs_and_these_are_those_of_the_built_network(channels):
    random = np.random.default_rng(1)
    rows = np.stack([[random.choice(widths(g, 1)) for g in channels.groups] for _ in range(20)])
    costs = channels.costs(rows)
    assert (channels.costs.macs(rows) == costs.macs).all()
    scores = {group.name: random.random(group.size) for group in channels.free}
    plan = Widths(Problem(channels, {}, Target("fake"), None, None, 0), scores).plan(rows[0])
    graph = compressor.apply(plan, channels.graph)
    assert costs.params[0] == sum(p.numel() for p in graph.parameters())
    assert costs.memory_bytes[0] == sum(t.numel() * t.element_size() for t in [*graph.parameters(), *graph.buffers()])


def test_norm_scores_are_squared_norms_added_up_over_tied_filters(channels):
    genome = NormRanking(Problem(channels, {}, Target("fake"), None, None, 0))
    params = {name: 1.0 if name.startswith("scale") else 0.0 for name in genome.space}
    modules = dict(channels.graph.named_modules())
    stream = next(g for g in channels.groups if "stem" in g.layers)
    makers = [layer for layer in stream.layers if isinstance(modules[layer], torch.nn.Conv2d)]
    assert len(makers) == 3
    norms = torch.stack([modules[layer].weight.detach().double().square().sum((1, 2, 3)) for layer in makers])
    expected = norms.sum(0)
    assert np.allclose(genome.scores(params)[stream.name], expected.numpy())
    params["scale:stem"], params["shift:stem"] = 3.0, 2.0
    norms[0] = 3 * norms[0] + 2 * norms[0].std(correction=0)
    expected = norms.sum(0)
    assert np.allclose(genome.scores(params)[stream.name], expected.numpy())


class Padded(torch.nn.Module):
    """A shortcut without weights, zeros added on both sides: the sum's channels are those of three groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 16, 3, padding=1)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.wide(x) + torch.nn.functional.pad(x, (0, 0, 0, 0, 4, 4))).mean((2, 3)))


def test_a_layer_whose_filters_lie_in_several_groups_is_shifted_by_one_amount():
    torch.manual_seed(0)
    channels = compressor.analyze(compressor.trace(Padded().eval(), (torch.zeros(1, 3, 6, 6),)))
    genome = NormRanking(Problem(channels, {}, Target("fake"), None, None, 0))
    params = {name: 1.0 if name.startswith("scale") else 0.0 for name in genome.space}
    moved, groups = genome.scores({**params, "shift:wide": 1.0}), [g for g in channels.free if "wide" in g.layers]
    amounts = np.concatenate([moved[g.name] - genome.scores(params)[g.name] for g in groups])
    assert len(groups) > 1
    assert len(amounts) == 16
    norms = channels.graph.get_submodule("wide").weight.detach().double().square().sum((1, 2, 3))
    assert np.allclose(amounts, norms.std(correction=0).item())


def test_an_impossible_budget_says_how_small_the_smallest_is(channels):
    full = float(channels.costs_of(channels.full).macs[0])
    problem = Problem(channels, Budget(macs=0.001).limits({"macs": full}), Target("fake"), None, None, 0)
    with pytest.raises(BudgetError, match=r"smallest legal network has macs .* \(asked: macs"):
        LeGR.published(trials=3).plan(problem)
