"""Branches: which are found, under which names, and which are not because something else would change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.channels.branches import branches_of
from compressor.passes.channels.search_space import SearchSpace
from tests.networks import Net, cbr, conv, end, head

X = (torch.randn(1, 3, 8, 8),)


class Block(nn.Module):
    """Two convolutions, the second without an activation, beside what `shortcut` makes."""

    def __init__(self, i, o, stride=1, project=None):
        super().__init__()
        self.conv1, self.conv2 = conv(i, o, stride=stride), conv(o, o)
        self.project = project

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(y + (x if self.project is None else self.project(x)))


def stem(m, x):
    return F.relu(m.stem(x))


def shared(m, x):
    x = stem(m, x)
    y = m.a(x)
    return end(m, torch.cat([x + y, y], 1))


def scaled(m, x):
    x = stem(m, x)
    return end(m, torch.add(m.a(x), x, alpha=2))


def broadcast(m, x):
    x = stem(m, x)
    return end(m, x + m.a(x).mean((2, 3), keepdim=True))


def written(m, x):
    x = m.stem(x)
    y = m.a(F.relu_(x))
    return end(m, x + y)


def subtracted(m, x):
    x = stem(m, x)
    return end(m, x - m.a(x))


def sequence(*parts):
    return lambda m, x: end(m, nn.Sequential(*[getattr(m, part) for part in parts])(stem(m, x)))


CASES = {
    "a block": (sequence("a"), {"a": Block(6, 6)}, 6, ["a"]),
    "several": (sequence("a", "b"), {"a": Block(6, 6), "b": Block(6, 6)}, 6, ["a", "b"]),
    "both sides of an addition": (sequence("a"), {"a": Block(6, 8, 2, nn.Conv2d(6, 8, 1, 2))}, 8, ["a.conv1-conv2", "a.project"]),
    "one layer": (lambda m, x: end(m, (s := stem(m, x)) + m.a(s)), {"a": conv(6, 6)}, 6, ["a"]),
    "three terms": (lambda m, x: end(m, (s := stem(m, x)) + m.a(s) + m.b(s)), {"a": cbr(6, 6), "b": cbr(6, 6)}, 6, ["a", "b"]),
    "a scalar and a gate inside": (
        lambda m, x: end(m, (s := stem(m, x)) + 0.1 * m.a(s) * m.g(s.mean((2, 3), keepdim=True)).sigmoid()),
        {"a": cbr(6, 6), "g": nn.Conv2d(6, 6, 1)}, 6, ["g", "a.0-g"],
    ),
    "a gate for channels": (
        lambda m, x: end(m, (s := stem(m, x)) * m.g(s.mean((2, 3), keepdim=True)).sigmoid()), {"g": nn.Conv2d(6, 6, 1)}, 6, ["g"],
    ),
    "a gate for pixels, in place": (
        lambda m, x: end(m, stem(m, x).mul_(m.g(m.stem(x)).sigmoid())), {"g": nn.Conv2d(6, 1, 1)}, 6, ["stem-g"],
    ),
    "an activation is no gate": (lambda m, x: end(m, (s := m.a(stem(m, x))) * s.sigmoid()), {"a": conv(6, 6)}, 6, []),
    "a factor of each channel is no gate": (
        lambda m, x: end(m, stem(m, x) * m.g.weight.mean((1, 2, 3)).view(1, 6, 1, 1)), {"g": nn.Conv2d(6, 6, 1)}, 6, [],
    ),
    "one in another": (
        lambda m, x: end(m, (s := stem(m, x)) + m.b((t := m.a(s)) + m.c(t))),
        {"a": cbr(6, 6), "b": cbr(6, 6), "c": cbr(6, 6)}, 6, ["c", "a.0-b.1"],
    ),
    "a difference": (subtracted, {"a": conv(6, 6)}, 6, ["a"]),
    "read elsewhere": (shared, {"a": conv(6, 6)}, 12, []),
    "a shortcut that is scaled": (scaled, {"a": conv(6, 6)}, 6, []),
    "broadcast": (broadcast, {"a": conv(6, 6)}, 6, []),
    "an activation that writes to the shortcut": (written, {"a": conv(6, 6)}, 6, ["a"]),
    "a view of the sum that is written to": (
        lambda m, x: m.fc(F.relu_(((s := stem(m, x)) + m.a(s)).flatten(2)).mean(-1) * s.mean((2, 3))), {"a": conv(6, 6)}, 6, [],
    ),
    "a shortcut that is written to behind the sum": (
        lambda m, x: end(m, (y := (s := m.stem(x)) + m.a(s)) * F.relu_(s) + y), {"a": conv(6, 6)}, 6, [],
    ),
    "a chain": (sequence("a"), {"a": cbr(6, 6)}, 6, []),
    "the network itself": (lambda m, x: end(m, m.stem(x) + m.a(x)), {"a": conv(3, 6)}, 6, ["stem", "a"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_branches_are_found(case):
    forward, layers, width, expected = CASES[case]
    graph = compressor.trace(Net(forward, stem=conv(3, 6), fc=head(width), **layers).eval(), X)
    assert [branch.name for branch in branches_of(graph)] == expected


def test_nodes_of_a_branch_are_read_by_it_alone():
    graph = compressor.trace(Net(sequence("a", "b"), stem=conv(3, 6), fc=head(6), a=Block(6, 6), b=Block(6, 6)).eval(), X)
    nodes = {node.name: node for node in graph.graph.nodes}
    for branch in branches_of(graph):
        for name in branch.nodes:
            assert {user.name for user in nodes[name].users} <= {*branch.nodes, branch.at}
        assert branch.shortcut not in branch.nodes
        assert branch.at not in branch.nodes


def test_what_is_inside_is_named():
    forward, layers, width, _ = CASES["one in another"]
    graph = compressor.trace(Net(forward, stem=conv(3, 6), fc=head(width), **layers).eval(), X)
    inner, outer = branches_of(graph)
    assert outer.inside == (inner.name,)
    assert not inner.inside
    assert set(inner.nodes) < set(outer.nodes)


def test_of_two_that_meet_the_larger_one_may_go():
    forward, layers, width, _ = CASES["both sides of an addition"]
    channels = compressor.analyze(compressor.trace(Net(forward, stem=conv(3, 6), fc=head(width), **layers).eval(), X))
    space = SearchSpace.of(channels, ranks=False, depth=True)
    assert [axis.branch.name for axis in space.depth] == ["a.conv1-conv2"]


def test_an_axis_knows_what_it_holds():
    graph = compressor.trace(Net(sequence("a", "b"), stem=conv(3, 6), fc=head(6), a=Block(6, 6), b=Block(6, 6)).eval(), X)
    space = SearchSpace.of(compressor.analyze(graph), ranks=False, depth=True)
    assert [axis.holds for axis in space.depth] == [("a.conv1",), ("b.conv1",)]
    row = space.widths([space.full])[0]
    row[-2], row[1] = 0, 2
    found = space.structure_of(row)
    assert found.removed == ("a",)
    assert dict(found.widths)["a.conv1"] == 6, "what a branch that is gone holds has no width of its own"
