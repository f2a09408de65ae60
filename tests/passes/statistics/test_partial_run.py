"""`Prefix`: in parts = at once, every node once, and activations beyond the memory in files."""

import copy

import pytest
import torch

import compressor
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.trace import outputs_of
from tests.networks import Residual, randomize

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CALIBRATION = Calibration(tuple((x,) for x in X.split(5)))


@pytest.fixture(scope="module")
def graph():
    return compressor.trace(randomize(Residual(8, 12)), (torch.zeros(1, 3, 8, 8),)).eval()


def joined(prefix):
    return torch.cat([outputs_of(output)[0] for output in prefix.finish()])


def expected(graph):
    with torch.no_grad():
        return graph(X)


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["memory", "files"])
def test_stopping_anywhere_gives_the_same_outputs(graph, memory):
    prefix = Prefix(graph, CALIBRATION, Shelf(memory))
    for node in list(graph.graph.nodes)[1:-1:3]:
        prefix.before(node.name)
    assert torch.equal(joined(prefix), expected(graph))


def test_every_node_runs_once_per_batch_and_what_is_not_read_again_is_let_go(graph):
    calls = []
    hooks = [m.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, m in graph.named_modules() if name]
    try:
        prefix = Prefix(graph, CALIBRATION, Shelf(1 << 30))
        nodes = list(graph.graph.nodes)
        for node in nodes[1:-1]:
            prefix.before(node.name)
            prefix.before(nodes[1].name)  # far behind: nothing happens
            assert len(prefix._environments[0]) <= 4
        list(prefix.finish())
    finally:
        for hook in hooks:
            hook.remove()
    assert {name: calls.count(name) for name in set(calls)} == dict.fromkeys(set(calls), 3)


def test_a_fork_goes_its_own_way(graph):
    other = copy.deepcopy(graph)
    with torch.no_grad():
        list(other.parameters())[-1].add_(1.0)
    prefix = Prefix(graph, CALIBRATION, Shelf(1 << 30))
    prefix.before(list(graph.graph.nodes)[6].name)
    found = joined(prefix.fork(other))
    assert torch.equal(found, expected(other))
    assert not torch.equal(found, expected(graph))
    assert torch.equal(joined(prefix), expected(graph))


def test_the_shelf_gives_memory_back():
    shelf = Shelf(4000)
    first = shelf.keep(torch.ones(1000))
    second = shelf.keep(torch.full((1000,), 2.0))
    assert first.untyped_storage().filename is None
    assert second.untyped_storage().filename is not None
    assert torch.equal(second, torch.full((1000,), 2.0))
    del first
    assert shelf.keep(torch.ones(1000)).untyped_storage().filename is None
