"""An engine that TensorRT or TensorRT-RTX built, alive in its worker process: run, timed, taken apart by layer."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import BackendError
from compressor.runtime.backends.base import Arrays, LayerTime
from compressor.runtime.backends.worker_process import WorkerProcess
from compressor.runtime.onnx.export import LAYER
from compressor.runtime.timing.timers import Sample, Timer
from compressor.values.target import Target


def check_types(found: Mapping[str, int], precision: str) -> None:
    """Refuse an engine none of whose convolutions and products have the precision that was asked for."""
    wanted = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision]
    if found and not found.get(wanted):
        counts = ", ".join(f"{count} in {name}" for name, count in found.items())
        raise BackendError(f"the engine was to be {precision}, but its convolutions and matrix products are {counts}")


class TensorRTEngine:
    """An engine in its worker process. It ends with the `with` block."""

    def __init__(
        self,
        worker: WorkerProcess,
        folder: tempfile.TemporaryDirectory[str],
        file: Path,
        target: Target,
        example: Sequence[Tensor] | None = None,
        model: onnx.ModelProto | None = None,
    ) -> None:
        self._worker, self._folder, self._target = worker, folder, target
        refit = None
        if target.options["strip_weights"] and model is None:
            raise BackendError(f"{file.name} holds no weights; it is loaded together with the ONNX model that it was built from")
        if target.options["strip_weights"] and model is not None:
            refit = Path(folder.name) / "weights.onnx"
            refit.write_bytes(model.SerializeToString())
        compatible = target.options["version_compatible"]
        loaded = worker.ask("load", 120, engine=str(file), version_compatible=compatible, refit=str(refit) if refit else None)
        self.tensors: list[dict[str, Any]] = loaded["tensors"]
        self.information: list[dict[str, Any]] = loaded["layers"]
        self._bytes = {"engine_bytes": file.stat().st_size, "device_bytes": int(loaded["device_bytes"])}
        self._example = [x.detach().cpu().contiguous().numpy() for x in example] if example is not None else self._random()
        self._modules = _modules_of(model)
        types = engine_types(self.information)
        if types and model is not None:  # what the builder really chose, the flags of old releases included
            check_types(types, target.precision)

    def _random(self) -> Arrays:
        """Inputs of the target's batch, for an engine that came as a file."""
        random = np.random.default_rng(0)
        shapes = [(self._target.batch, *tensor["profile"][1][1:]) for tensor in self.tensors if tensor["input"]]
        return [random.standard_normal(shape).astype(np.float32) for shape in shapes]

    def run(self, inputs: Sequence[NDArray[np.generic]]) -> Arrays:
        """Outputs in the order of the model's outputs."""
        found = self._worker.ask("run", 120, inputs=self._files(inputs), folder=self._folder.name)
        return [np.fromfile(o["path"], dtype=o["dtype"]).reshape(o["shape"]) for o in found["outputs"]]

    def timer(self) -> Timer:
        """Time between two events around replays of a CUDA graph."""
        self._worker.ask("prepare", 120, inputs=self._files(self._example, "timed"), cuda_graph=self._target.options["cuda_graph"])

        def timer(count: int) -> Sample:
            found = self._worker.ask("time", 120, count=count)
            return Sample(found["gpu_s"], found["gpu_s"], False, host_s=found["host_s"], enqueue_s=found["enqueue_s"])

        return timer

    def layers(self, runs: int = 30) -> list[LayerTime]:
        """Time per layer from TensorRT's profiler, which adds to each: they are not expected to sum to the latency."""
        graph = self._target.options["cuda_graph"]  # a timer that is at hand goes on with what is prepared here
        self._worker.ask("prepare", 120, inputs=self._files(self._example, "timed"), cuda_graph=graph)
        found = self._worker.ask("profile", 300, runs=runs)["layers"]
        about = {str(layer.get("Name")): layer for layer in self.information}
        return [self._layer(item, about.get(item["name"], {})) for item in found]

    def _layer(self, item: Mapping[str, Any], about: Mapping[str, Any]) -> LayerTime:
        nodes = [part.strip("[] ").removeprefix("ONNX Layer: ") for part in str(about.get("Metadata", "")).split("\x1e") if part]
        nodes = nodes or re.split(r" \+ | \|\| ", str(item["name"]))  # TensorRT before 8.6 tells them by the name alone
        modules = dict.fromkeys(self._modules.get(node, node) for node in nodes)
        return LayerTime(item["name"], str(about.get("LayerType", "")), float(item["median_ms"]), tuple(modules))

    def memory(self) -> dict[str, int]:
        """Size of the engine file, and the scratch memory of its context."""
        return dict(self._bytes)

    def _files(self, arrays: Sequence[NDArray[np.generic]], purpose: str = "input") -> list[dict[str, object]]:
        if not Path(self._folder.name).is_dir():
            raise BackendError("this engine is closed; build it again")
        names = [tensor for tensor in self.tensors if tensor["input"]]
        if len(names) != len(arrays):
            raise BackendError(f"the engine takes {len(names)} inputs, {len(arrays)} were given")
        files: list[dict[str, object]] = []
        for tensor, array in zip(names, arrays, strict=True):
            _check_shape(tensor, array.shape)
            path = Path(self._folder.name) / f"{purpose}-{len(files)}.bin"
            path.write_bytes(np.ascontiguousarray(array).astype(tensor["dtype"], copy=False).tobytes())
            files.append({"name": tensor["name"], "path": str(path), "shape": list(array.shape)})
        return files

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the process."""
        self._worker.close()
        self._folder.cleanup()


def _check_shape(tensor: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    least, _, most = tensor["profile"]
    if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
        raise BackendError(f"input {tensor['name']} has shape {shape}, the engine was built for {tuple(least)} to {tuple(most)}")


def _modules_of(model: onnx.ModelProto | None) -> dict[str, str]:
    """ONNX node -> PyTorch module, where the exporter noted it."""
    nodes = [] if model is None else model.graph.node
    return {node.name: prop.value for node in nodes for prop in node.metadata_props if prop.key == LAYER}


def engine_types(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Precision -> number of convolution and matrix layers, from the engine inspector's descriptions.

    It is the type of a layer's weights, or of its input where those are not told; for an engine of a dynamic batch, TensorRT
    8 tells the types of no tensor ("N/A due to dynamic shapes").
    """
    counts: dict[str, int] = {}
    for layer in layers:
        kind = f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
        inputs = [tensor for tensor in layer.get("Inputs") or [] if isinstance(tensor, dict)]
        weights = layer.get("Weights")
        weights = weights if isinstance(weights, dict) else {}
        if not (inputs or weights) or not any(word in kind for word in ("conv", "gemm", "matmul", "matrix")):
            continue
        described = [weights.get("Type"), *(inputs[0].get(key) for key in ("Format/Datatype", "Datatype") if inputs)]
        text = next((str(x).lower() for x in described if x and not str(x).startswith("N/A")), "")
        for word, name in (("int8", "int8"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("float", "float32")):
            if word in text:
                counts[name] = counts.get(name, 0) + 1
                break
    return counts
