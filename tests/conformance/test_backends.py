"""One suite for every back end: outputs equal PyTorch's, enough samples, memory is released, misuse is said."""

import numpy as np
import pytest
import torch

import compressor
from compressor.passes.layers.forms import FORMS
from compressor.runtime.backends import BACKENDS, Workload
from compressor.runtime.measuring.measure import check_parity, example_for, measure
from compressor.runtime.onnx.precision import PARITY
from compressor.runtime.timing.protocol import Protocol
from tests.networks import Residual, factorized, randomize

QUICK = Protocol(warm_up_s=0.02, settle_s=0.2, min_samples=30, max_samples=40, max_s=5.0)
HEALTH = {name: make().check() for name, make in BACKENDS.items()}
CASES = [(name, precision) for name, make in sorted(BACKENDS.items()) for precision in make().precisions]


def need(name):
    if not HEALTH[name].works:
        pytest.skip(f"{name}: {HEALTH[name].detail}")


@pytest.fixture(params=sorted(BACKENDS))
def target(request):
    need(request.param)
    return compressor.Target(request.param)


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return compressor.trace(randomize(Residual()).eval(), (torch.randn(1, 3, 8, 8),))


def build(graph, target):
    return BACKENDS[target.backend]().build(Workload(example_for(graph, target), graph), target)


def test_outputs_equal_pytorch_at_the_targets_batch(target, graph):
    with build(graph, compressor.Target(target.backend, batch=5)) as engine:
        for batch in (1, 5):
            x = torch.randn(batch, 3, 8, 8)
            (found,) = engine.run([x.numpy()])
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(np.asarray(found)), graph(x), rtol=1e-4, atol=1e-5)  # other kernels


@pytest.mark.parametrize("form", FORMS)
def test_factorized_layers_are_the_same_there(target, graph, form):
    small = factorized(graph, form)
    with build(small, target) as engine:
        assert check_parity(engine, small, example_for(small, target), PARITY["fp32"]) <= PARITY["fp32"]
        with pytest.raises(compressor.BackendError, match="differ from PyTorch's by a relative"):
            check_parity(engine, graph, example_for(graph, target), PARITY["fp32"])


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_precision_stays_within_its_tolerance_and_is_told_from_another_network(name, precision, graph):
    need(name)
    target = compressor.Target(name, batch=4, precision=precision)
    example = example_for(graph, target)
    other = compressor.trace(randomize(Residual()), (torch.randn(1, 3, 8, 8),)).eval()
    with build(graph, target) as engine:
        assert check_parity(engine, graph, example, PARITY[precision]) <= PARITY[precision]
        assert engine.run([x.numpy() for x in example])[0].dtype == np.float32
        with pytest.raises(compressor.BackendError, match="differ from PyTorch's by a relative"):
            check_parity(engine, other, example, PARITY[precision])


def test_building_leaves_the_graph_and_its_mode_alone(target, graph):
    graph.train()
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    with build(graph, target) as engine:
        engine.run([torch.randn(1, 3, 8, 8).numpy()])
    assert graph.training
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())


def test_it_measures_enough_samples_and_says_on_what(target, graph):
    found = measure({"a": graph}, target, protocol=QUICK)["a"]
    assert len(found.times_ms) + found.discarded >= 30
    assert len(found.raw_ms) >= 30
    assert found.median_ms > 0
    assert found.target["backend"] == target.backend
    assert found.target["batch"] == 1
    assert found.details["noise_floor"] >= 0.005


def test_engines_tell_their_size_and_layers_belong_to_modules(target, graph):
    with build(graph, target) as engine:
        assert engine.memory()["engine_bytes"] > 4 * 1000
        known = dict(graph.named_modules())
        layers = engine.layers(runs=5)
    assert all(layer.median_ms >= 0 for layer in layers)
    if target.backend not in ("torch", "onnxruntime-cuda"):  # which do not tell
        assert {"stem", "conv1", "conv2", "fc"} <= {module for layer in layers for module in layer.modules} & set(known)


def test_a_closed_engine_says_so(target, graph):
    engine = build(graph, target)
    with engine:
        pass
    if target.backend == "fake":
        return
    with pytest.raises(compressor.BackendError):
        engine.run([torch.randn(1, 3, 8, 8).numpy()])


def test_a_fingerprint_names_back_end_version_and_settings(target):
    found = target.fingerprint()
    assert {"backend", "batch", "threads", "precision", "options"} <= set(found)
    assert found["options"] == dict(target.options)


def test_health_says_what_is_there_or_what_to_do():
    for name, health in HEALTH.items():
        assert health.detail, name
        assert health.works or health.remedy, name


def test_an_unknown_back_end_is_named_with_those_there_are():
    with pytest.raises(compressor.BackendError, match=r"no back end `tpu`; there are fake, onnxruntime"):
        compressor.Target("tpu")


@pytest.mark.parametrize("name", ["batch", "threads", "align"])
def test_numbers_of_a_target_must_be_positive(name):
    with pytest.raises(compressor.BackendError, match=name):
        compressor.Target(**{name: 0})


def test_unknown_precisions_and_options_are_named_with_those_there_are():
    with pytest.raises(compressor.BackendError, match="no precision 'fp8'; it has fp32, fp16, int8"):
        compressor.Target(precision="fp8")
    with pytest.raises(compressor.BackendError, match="no option `speed`; it has mode, device"):
        compressor.Target("torch", options={"speed": 1})
    with pytest.raises(compressor.BackendError, match="option `mode` of `torch` is a str"):
        compressor.Target("torch", options={"mode": 1})
    with pytest.raises(compressor.BackendError, match="one of eager, compile, cudagraph"):
        BACKENDS["torch"]().build(
            Workload((), compressor.trace(torch.nn.ReLU(), (torch.ones(1),))), compressor.Target("torch", options={"mode": "x"})
        )
