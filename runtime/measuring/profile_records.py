"""Records of a profile: one JSON object per measurement, and the two files that NVIDIA's analysers open.

The records say what was measured, on what, how, and everything that was seen. `profile_<back end>.json` and
`layers_<back end>.json` have the layout of trtexec's `--exportProfile` and `--exportLayerInfo`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compressor.runtime.backends.base import LayerTime
from compressor.values.measurement import Measurement
from compressor.values.plan import digest_of
from compressor.values.target import Target

SCHEMA = 1


@dataclass(frozen=True)
class Profiled:
    """One engine that was profiled, or could not be.

    Attributes:
        target: The target.
        graph_hash: Digest of structure and shapes, without weights.
        inputs: Shape of every input, by name.
        measurement: Its latency; None where `failure` says why there is none.
        failure: Why it could not be built, or is not timed.
        parity: Relative error (L2) against PyTorch, or against ONNX Runtime in fp32 for a network that came as ONNX; None
            for an engine file, whose origin is not known.
        build_s: Seconds that building took.
        memory: Bytes; see `Engine.memory`.
        layers: Time per layer, where asked for.
        accuracy: Top-1 in percent on validation data, where given.
        notes: What a reader should know.
    """

    target: Target
    graph_hash: str
    inputs: Mapping[str, Sequence[int]]
    measurement: Measurement | None = None
    failure: str = ""
    parity: float | None = None
    build_s: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[LayerTime, ...] = ()
    accuracy: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def throughput(self) -> float | None:
        """Samples per second at the median latency."""
        return None if self.measurement is None else 1e3 * self.target.batch / self.measurement.median_ms

    @property
    def status(self) -> str:
        """Of the measurement, or `build_failed` or `failed_parity`."""
        if self.measurement is not None:
            return self.measurement.status
        return "failed_parity" if "outputs differ" in self.failure else "build_failed"

    def to_dict(self, raw: str, reproduce: Mapping[str, str]) -> dict[str, object]:
        """The record.

        Args:
            raw: Name of the file that holds the raw samples.
            reproduce: Commands that do the same again.
        """
        key = self._key()
        result: dict[str, object] = {"status": self.status}
        warnings: list[object] = list(self.notes)
        if self.measurement is None:
            result["failure"] = self.failure
        else:
            details = self.measurement.details
            on_gpu = "enqueue_ms" in details
            result["gpu_time_ms" if on_gpu else "host_latency_ms"] = self.measurement.summary()
            if on_gpu:
                result["host_latency_ms"] = {"median": details.get("host_ms")}
                result["enqueue_ms"] = {"median": details["enqueue_ms"]}
            result["throughput_ips"] = self.throughput
            for name in ("clocks", "sentinel", "noise_floor"):
                if name in details:
                    result[name] = details[name]
            seen = details.get("warnings")
            warnings += seen if isinstance(seen, list) else []
        result.update(
            memory=dict(self.memory), build_s=self.build_s, parity={"rel_l2": self.parity}, accuracy_percent=self.accuracy
        )
        if self.layers:
            total = sum(layer.median_ms for layer in self.layers)
            result["layers"] = [self._layer(layer, total) for layer in self.layers]
            result["layer_sum_ms"] = total
            result["residual_ms"] = None if self.measurement is None else self.measurement.median_ms - total
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {
            "schema_version": SCHEMA, "id": f"sha256:{digest_of([key, created])}", "created": created, "key": key, "result": result,
            "raw_samples": raw, "warnings": warnings, "reproduce": dict(reproduce),
        }  # fmt: skip

    def _key(self) -> dict[str, object]:
        fingerprint = dict(self.measurement.target) if self.measurement is not None else self.target.to_dict()
        cpu = self.target.backend == "onnxruntime" or self.target.options.get("device") == "cpu"
        known = {"backend", "backend_version", "device", "driver", "cuda", "cudnn", "precision", "protocol", "options", "threads"}
        others = {name: value for name, value in fingerprint.items() if name not in known}
        return {
            "backend": self.target.backend,
            "backend_version": fingerprint.get("backend_version"),
            "mode": "cpu" if cpu else "gpu",
            "device": {"name": fingerprint.get("device"), "cc": fingerprint.get("cc")},
            "driver": fingerprint.get("driver"), "cuda": fingerprint.get("cuda"), "cudnn": fingerprint.get("cudnn"),
            "cpu": fingerprint.get("device") if cpu else None,
            "precision": self.target.precision, "io_dtype": "fp32",
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "build": {"options": dict(self.target.options)},
            "session": {"threads": self.target.threads if cpu else None, **others},
            "graph_hash": self.graph_hash, "protocol": fingerprint.get("protocol"),
        }  # fmt: skip

    @staticmethod
    def _layer(layer: LayerTime, total: float) -> dict[str, object]:
        share = 100 * layer.median_ms / total if total else 0.0
        return {"name": layer.name, "type": layer.kind, "fx": list(layer.modules), "median_ms": layer.median_ms, "pct": share}


def analyser_files(found: Profiled, runs: int) -> dict[str, str]:
    """File name -> text of the two files for NVIDIA's analysers (TREx): layers, and their times.

    Args:
        found: An engine profiled with layers.
        runs: How many runs the times are of.
    """
    total = sum(layer.median_ms for layer in found.layers) or 1.0
    times = [
        {
            "name": layer.name, "timeMs": layer.median_ms * runs, "averageMs": layer.median_ms, "medianMs": layer.median_ms,
            "percentage": 100 * layer.median_ms / total,
        }
        for layer in found.layers
    ]  # fmt: skip
    layers = [
        {"Name": layer.name, "LayerType": layer.kind, "Inputs": [], "Outputs": [], "Metadata": ", ".join(layer.modules)}
        for layer in found.layers
    ]
    name = f"{found.target.backend}-{found.target.precision}-b{found.target.batch}"
    return {
        f"profile_{name}.json": json.dumps([{"count": runs}, *times], indent=1) + "\n",
        f"layers_{name}.json": json.dumps({"Layers": layers, "Bindings": list(found.inputs)}, indent=1) + "\n",
    }


def trtexec_command(found: Profiled, model: str) -> str:
    """The trtexec command that times the same network, the defaults of TensorRT 11 spelled out for 10."""
    shapes = ",".join(f"{name}:{'x'.join(str(size) for size in shape)}" for name, shape in found.inputs.items())
    return (
        f"trtexec --onnx={model} --shapes={shapes} --warmUp=200 --duration=5 --useCudaGraph --useSpinWait --noDataTransfers "
        "--profilingVerbosity=detailed --exportTimes=times.json"
    )
