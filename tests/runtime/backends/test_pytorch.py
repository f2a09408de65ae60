"""PyTorch as a back end: modes, precisions and layouts give PyTorch's own answers; what cannot be is said."""

import pytest
import torch

import compressor
from compressor.runtime.backends import BACKENDS, Workload
from compressor.runtime.measuring.measure import check_parity, example_for
from compressor.runtime.onnx.precision import PARITY
from tests.networks import Residual, randomize


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return compressor.trace(randomize(Residual()).eval(), (torch.randn(1, 3, 8, 8),))


@pytest.mark.parametrize("mode", ["eager", "compile"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modes_precisions_and_layouts(graph, mode, channels_last, precision):
    options = {"mode": mode, "channels_last": channels_last}
    target = compressor.Target("torch", batch=2, precision=precision, options=options)
    example = example_for(graph, target)
    threads = torch.get_num_threads()
    with BACKENDS["torch"]().build(Workload(example, graph), target) as engine:
        check_parity(engine, graph, example, PARITY[precision])
        assert engine.timer()(3).wall_s > 0
    assert torch.get_num_threads() == threads
    assert next(graph.parameters()).dtype == torch.float32


def test_what_needs_a_gpu_says_so(graph):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for options, message in (({"device": "cuda"}, "sees no GPU"), ({"mode": "cudagraph"}, "CUDA graphs need a GPU")):
        target = compressor.Target("torch", options=options)
        with pytest.raises(compressor.BackendError, match=message):
            BACKENDS["torch"]().build(Workload(example_for(graph, target), graph), target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_cuda_graph_gives_the_same_outputs_and_is_no_slower_than_eager(graph, precision):
    times = {}
    for mode in ("eager", "cudagraph"):
        target = compressor.Target("torch", batch=2, precision=precision, options={"mode": mode, "device": "cuda"})
        example = example_for(graph, target)
        with BACKENDS["torch"]().build(Workload(example, graph), target) as engine:
            check_parity(engine, graph, example, PARITY[precision])
            timer = engine.timer()
            timer(50)
            times[mode] = timer(200).wall_s
    assert times["cudagraph"] < 1.2 * times["eager"]
