"""The steps of `gpu_check.py` on TensorRT; see `gpu_steps.py`."""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from gpu_steps import NETWORKS, Skip, networks, protocol, pruned, target_of


def tensorrt(arguments):
    """Real TensorRT: parity, the built engine's types, latency beside PyTorch's CUDA graph and beside plain enqueues, per layer."""
    import compressor
    from compressor.runtime.backends import BACKENDS

    health = BACKENDS["tensorrt"]().check()
    print(health.detail)
    if not health.works:
        raise Skip(f"{health.detail}; {health.remedy}")
    graphs = dict(networks(arguments, NETWORKS[:2]))
    variants = {f"{name} 50 % removed" if r else name: pruned(g, r) if r else g for name, g in graphs.items() for r in (0, 0.5)}
    for precision, names in (
        ("fp16", list(variants)[:2]),
        ("int8", list(variants)[:2]),
        ("fp16", list(variants)[2:]),
        ("int8", list(variants)[2:]),
    ):
        for name in names:
            try:
                yield engine_row(name, variants[name], precision, arguments)
            except compressor.BackendError as error:
                yield {"network": name, "precision": precision, "batch": 8, "failure": str(error)}


def engine_row(name, graph, precision, arguments):
    """One engine of TensorRT, everything about it."""
    import compressor
    from compressor.runtime.backends import Workload
    from compressor.runtime.backends.tensorrt import TensorRT
    from compressor.runtime.backends.tensorrt_engine import engine_types
    from compressor.runtime.measuring.measure import built, check_parity, clocks_of, example_for
    from compressor.runtime.onnx.precision import PARITY
    from compressor.runtime.timing.protocol import time_together

    target, plain = (compressor.Target("tensorrt", batch=8, precision=precision, options={"cuda_graph": g}) for g in (True, False))
    example = example_for(graph, target)
    calibration = [example_for(graph, target, seed) for seed in range(1, 5)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workload = Workload(example, graph, calibration=calibration)
        about = TensorRT().compile(workload, target, folder / "engine")
        print(f"{name} {precision}: built in {about['build_s']:.0f} s", flush=True)
        engine, direct = (stack.enter_context(TensorRT().load(folder / "engine", t, workload.onnx())) for t in (target, plain))
        row = {
            "network": name,
            "backend": "tensorrt",
            "precision": precision,
            "batch": 8,
            "build": {**about, **dict(target.options)},
        }
        row["types"] = engine_types(engine.information)
        row["parity"] = check_parity(engine, graph, list(calibration[0]), PARITY[precision])
        torch_target = target_of(arguments, 8)
        timers = {"tensorrt": engine.timer(), "torch": built(stack, graph, torch_target).timer()}
        found = time_together(timers, {}, 0, protocol(arguments), clocks=clocks_of(target))
        row |= {
            "median_ms": found["tensorrt"].median_ms,
            "ci95": list(found["tensorrt"].interval_ms),
            "status": found["tensorrt"].status,
        }
        row |= {"cudagraph_fp16_ms": found["torch"].median_ms, "options": {"mode": "tensorrt"}}
        single, own = direct.timer(), engine.timer()
        row["enqueue_ms"] = 1e3 * statistics.median([single(1).wall_s for _ in range(220)][20:])  # events around each enqueueV3
        row["graph_ms"] = 1e3 * statistics.median([own(1).wall_s for _ in range(220)][20:])
        layers = sorted(engine.layers(), key=lambda layer: -layer.median_ms)
        row |= {
            "layer_sum_ms": sum(layer.median_ms for layer in layers),
            "layers_count": len(layers),
            "memory": dict(engine.memory()),
        }
        row["layers"] = [[layer.name[:80], layer.kind, layer.median_ms, list(layer.modules)[:4]] for layer in layers[:12]]
    return row


def tensorrt_rtx(arguments):
    """TensorRT-RTX: does it run on this device at all?"""
    from compressor.pipeline.profiling import Network, profile_network
    from compressor.runtime.backends import BACKENDS
    from compressor.values.target import Target

    health = BACKENDS["tensorrt-rtx"]().check()
    if not health.works:
        raise Skip(f"{health.detail}; {health.remedy}")
    name, graph = next(networks(arguments))
    (found,) = profile_network(Network(name, graph=graph), [Target("tensorrt-rtx", precision="fp16")], protocol=protocol(arguments))
    return [
        {
            "network": name,
            "status": found.status,
            "failure": found.failure,
            "median_ms": found.measurement and found.measurement.median_ms,
        }
    ]
