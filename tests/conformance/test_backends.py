"""One suite for every back end: outputs equal PyTorch's, enough samples, memory is released, misuse is said."""

import numpy as np
import pytest
import torch

import compressor
from compressor.runtime import BACKENDS
from compressor.runtime.latency import check_parity, example_for, measure
from compressor.runtime.timing import Protocol
from tests.networks import Residual, randomize

QUICK = Protocol(warm_up_s=0.02, min_samples=30, max_samples=40, max_s=5.0)


@pytest.fixture(params=sorted(BACKENDS))
def target(request):
    return compressor.Target(request.param)


@pytest.fixture
def graph():
    return compressor.trace(randomize(Residual()), (torch.randn(1, 3, 8, 8),))


def test_outputs_equal_pytorch_at_several_batch_sizes(target, graph):
    with BACKENDS[target.backend]().build(graph, example_for(graph, target), target) as engine:
        for batch in (1, 5):
            x = torch.randn(batch, 3, 8, 8)
            (found,) = engine.run([x.numpy()])
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(np.asarray(found)), graph(x), rtol=1e-4, atol=1e-5)  # other kernels


def test_building_leaves_the_mode_alone(target, graph):
    graph.train()
    with BACKENDS[target.backend]().build(graph, example_for(graph, target), target) as engine:
        engine.run([torch.randn(1, 3, 8, 8).numpy()])
    assert graph.training


def test_it_measures_enough_samples_and_says_on_what(target, graph):
    found = measure({"a": graph}, target, protocol=QUICK)["a"]
    assert len(found.times_ms) + found.discarded >= 30
    assert found.median_ms > 0
    assert found.target["backend"] == target.backend
    assert found.target["batch"] == 1


def test_another_graph_fails_parity(target, graph):
    example = example_for(graph, target)
    with BACKENDS[target.backend]().build(graph, example, target) as engine:
        assert check_parity(engine, graph, example) < 1e-4
        with torch.no_grad():
            other = compressor.trace(graph, (torch.randn(1, 3, 8, 8),))
            other.get_parameter("fc.weight").mul_(1.01)
        with pytest.raises(compressor.BackendError, match="differ from PyTorch's by a relative"):
            check_parity(engine, other, example)


def test_an_unknown_back_end_is_named_with_those_there_are():
    with pytest.raises(compressor.BackendError, match=r"no back end `tpu`; there are fake, onnxruntime"):
        compressor.Target("tpu")


@pytest.mark.parametrize("name", ["batch", "threads", "align"])
def test_numbers_of_a_target_must_be_positive(name):
    with pytest.raises(compressor.BackendError, match=name):
        compressor.Target(**{name: 0})
