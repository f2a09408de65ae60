"""TensorRT in a process of its own: builds, runs, times and profiles engines on behalf of `tensorrt.py`.

This file stands alone: it needs Python 3.8 or newer, the standard library, `tensorrt` (8.5 to 11) or
`tensorrt_rtx`, and the CUDA runtime library. It can be copied to a device and run there by the Python that has TensorRT.

    python tensorrt_worker.py tensorrt        # or tensorrt_rtx

It reads one JSON request per line from stdin, `{"op": "build", ...}`, and answers with one line on stdout,
`{"ok": true, ...}` or `{"ok": false, "error": "..."}`; a build sends `{"progress": [...]}` lines before. Tensors
travel as files of raw bytes. TensorRT's own messages go to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import importlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

Request = dict[str, Any]
NUMPY_NAMES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool", "UINT8": "uint8",
}  # fmt: skip
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8, "bool": 1, "uint8": 1}


class Cuda:
    """The few functions of the CUDA runtime that are needed, through ctypes."""

    def __init__(self) -> None:
        self.library = self._load()

    @staticmethod
    def _load() -> Any:
        names = [os.environ.get("COMPRESSOR_CUDART", ""), "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"]
        for folder in sys.path:
            names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libcudart.so*")))
        names += sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so*"))
        for name in filter(None, names):
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise RuntimeError("no libcudart was found; set COMPRESSOR_CUDART to its path")

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            text = self.library.cudaGetErrorString
            text.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {text(code).decode()}")

    def new(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that returns a handle through its first argument."""
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        return handle

    def elapsed_ms(self, start: Any, end: Any) -> float:
        found = ctypes.c_float()
        self("cudaEventElapsedTime", ctypes.byref(found), start, end)
        return found.value


def device() -> dict[str, str] | None:
    """Name, compute capability and driver of GPU 0, or None; asks the driver, which never crashes."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, version, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGetName(name, 128, 0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    return {
        "name": name.value.decode(),
        "cc": f"{major.value}.{minor.value}",
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
        return next((w for w in words if w.replace(".", "").isdigit() and "." in w), "unknown")
    except OSError:
        return "unknown"


class Worker:
    """One engine, and what was prepared for it."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.rtx = package == "tensorrt_rtx"
        self.device = device()
        self.trt = importlib.import_module(package)
        self.messages: list[str] = []
        self.logger = self._logger()
        self.engine: Any = None
        self.context: Any = None
        self.runtime: Any = None
        self.cuda: Any = None
        self.stream: Any = None
        self.graph: Any = None
        self.events: list[Any] = []
        self.buffers: dict[str, tuple[Any, int, tuple[int, ...] | None, str | None]] = {}
        self.prepared: Request = {}
        self.stale = True  # whether something else was run since `prepare`
        self.keep: list[Any] = []  # objects that TensorRT points to without owning them

    def _logger(self) -> Any:
        trt, messages = self.trt, self.messages

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    messages.append(message)
                if severity <= trt.ILogger.Severity.WARNING:
                    print(message, file=sys.stderr, flush=True)

        return Logger()

    # requests

    def hello(self, request: Request) -> Request:
        """Versions and device."""
        return {
            "package": self.package, "version": self.trt.__version__, "device": self.device,
            "python": sys.version.split()[0], "weakly_typed": self._weak(),
        }  # fmt: skip

    def _weak(self) -> bool:
        """TensorRT before 10: precision by builder flags; 10 knows both, and there strong typing is asked for."""
        return int(self.trt.__version__.split(".")[0]) < 10 and not self.rtx

    def build(self, request: Request) -> Request:
        """ONNX in, engine file out."""
        trt = self.trt
        if self.device is None and not self.rtx:
            raise RuntimeError("no CUDA device: TensorRT builds engines only where they are to run")
        del self.messages[:]
        builder = trt.Builder(self.logger)
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(request["onnx"]):
            errors = [str(parser.get_error(k)) for k in range(parser.num_errors)]
            raise RuntimeError("TensorRT's parser refuses the model: " + "; ".join(errors or self.messages))
        typed = self._network_types(network)
        config = self._config(builder, network, request)
        cache = self._timing_cache(config, request.get("timing_cache"))
        started = time.monotonic()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("TensorRT builds no engine: " + ("; ".join(self.messages[-3:]) or "no reason given"))
        seconds = time.monotonic() - started
        data = bytes(memoryview(plan))
        temporary = f"{request['engine']}.{os.getpid()}.partial"
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, request["engine"])
        if cache:
            self._save_timing_cache(config, cache)
        return {"build_s": seconds, "engine_bytes": len(data), "network_types": typed, "layers": network.num_layers}

    def _network_flags(self) -> int:
        flags = self.trt.NetworkDefinitionCreationFlag
        if self.rtx:
            return 0
        if self._weak():
            return 1 << int(flags.EXPLICIT_BATCH)
        return 1 << int(flags.STRONGLY_TYPED)

    def _network_types(self, network: Any) -> dict[str, int]:
        """How many of the layers that compute (convolution, matrix product) yield which type."""
        kinds = [getattr(self.trt.LayerType, name, None) for name in ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")]
        layers = [network.get_layer(k) for k in range(network.num_layers)]
        makers = {layer.get_output(i).name: layer.type for layer in layers for i in range(layer.num_outputs)}
        counts: dict[str, int] = {}
        for layer in layers:
            if layer.type in kinds:
                source = layer.get_input(0)
                name = NUMPY_NAMES.get(source.dtype.name, source.dtype.name)
                if makers.get(source.name) == self.trt.LayerType.DEQUANTIZE:
                    name = "int8"  # behind a DequantizeLinear TensorRT computes in INT8
                counts[name] = counts.get(name, 0) + 1
        return counts

    def _config(self, builder: Any, network: Any, request: Request) -> Any:
        trt = self.trt
        config = builder.create_builder_config()
        for name in self._flags(request):
            if not hasattr(trt.BuilderFlag, name):
                raise RuntimeError(f"{self.package} {trt.__version__} has no builder flag {name}")
            config.set_flag(getattr(trt.BuilderFlag, name))
        if not request.get("tf32", False) and hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if hasattr(config, "builder_optimization_level") and request.get("optimization_level", -1) >= 0:
            config.builder_optimization_level = request["optimization_level"]
        if request.get("hardware_compatible") and not self.rtx:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self._weak():  # cuBLAS and cuDNN may be absent beside old releases; convolutions do without
            sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
            config.set_tactic_sources(sum(1 << int(source) for source in sources))
        if hasattr(trt, "IProgressMonitor"):
            monitor = _progress_monitor(trt)
            self.keep.append(monitor)
            config.progress_monitor = monitor
        self._profile(builder, network, config, request.get("profile"))
        return config

    def _flags(self, request: Request) -> list[str]:
        flags: list[str] = []
        if self._weak():
            flags += {"fp16": ["FP16"], "int8": ["INT8", "FP16"]}.get(str(request.get("precision")), [])
        flags += ["VERSION_COMPATIBLE"] if request.get("version_compatible") else []
        flags += ["STRIP_PLAN"] if request.get("strip_weights") else []
        return flags

    def _profile(self, builder: Any, network: Any, config: Any, sizes: Sequence[int] | None) -> None:
        dynamic = [network.get_input(k) for k in range(network.num_inputs) if -1 in tuple(network.get_input(k).shape)]
        if not dynamic:
            return
        if not sizes:
            raise RuntimeError("the model has a dynamic batch; give the profile's minimum, optimum and maximum")
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            rest = tuple(tensor.shape)[1:]
            if tensor.shape[0] != -1 or -1 in rest:
                raise RuntimeError(f"input {tensor.name}: only the first axis may be dynamic, found {tuple(tensor.shape)}")
            profile.set_shape(tensor.name, *[(size, *rest) for size in sizes])
        config.add_optimization_profile(profile)

    def _timing_cache(self, config: Any, path: str | None) -> str | None:
        if not path or self.rtx or not hasattr(config, "create_timing_cache"):
            return None
        data = b""
        if os.path.exists(path):
            with open(path, "rb") as file:
                data = file.read()
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            cache = config.create_timing_cache(b"")  # of another device or version: start anew
            config.set_timing_cache(cache, ignore_mismatch=False)
        return path

    def _save_timing_cache(self, config: Any, path: str) -> None:
        """Merge with what other processes have written meanwhile, under a lock."""
        with open(path + ".lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cache = config.get_timing_cache()
            if os.path.exists(path):
                with open(path, "rb") as file:
                    other = config.create_timing_cache(file.read())
                if other is not None:
                    cache.combine(other, False)
            temporary = path + ".partial"
            with open(temporary, "wb") as file:
                file.write(bytes(memoryview(cache.serialize())))
            os.replace(temporary, path)

    def load(self, request: Request) -> Request:
        """Engine file in; says its tensors, memory and the types that its layers really have."""
        if self.device is None:
            raise RuntimeError("no CUDA device: engines can be built here, but not run")
        trt = self.trt
        del self.messages[:]
        self.cuda = Cuda()
        self.cuda("cudaSetDevice", 0)
        self.runtime = trt.Runtime(self.logger)
        if request.get("version_compatible"):
            self.runtime.engine_host_code_allowed = True
        with open(request["engine"], "rb") as file:
            self.engine = self.runtime.deserialize_cuda_engine(file.read())
        if self.engine is None:
            raise RuntimeError("the engine cannot be loaded: " + ("; ".join(self.messages[-3:]) or "no reason given"))
        if request.get("refit"):
            refitter = trt.Refitter(self.engine, self.logger)
            if (
                not trt.OnnxParserRefitter(refitter, self.logger).refit_from_file(request["refit"])
                or not refitter.refit_cuda_engine()
            ):
                raise RuntimeError("the stripped engine cannot be refitted: " + "; ".join(self.messages[-3:]))
        self.context = self.engine.create_execution_context()
        self.stream = self.cuda.new("cudaStreamCreate")
        size = getattr(self.engine, "device_memory_size_v2", None)
        return {
            "tensors": self._tensors(), "layers": self._layer_information(),
            "device_bytes": int(size if size is not None else self.engine.device_memory_size),
        }  # fmt: skip

    def _tensors(self) -> list[Request]:
        trt = self.trt
        found: list[Request] = []
        for k in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(k)
            is_input = self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = NUMPY_NAMES[self.engine.get_tensor_dtype(name).name]
            tensor = {"name": name, "input": is_input, "dtype": dtype, "shape": list(self.engine.get_tensor_shape(name))}
            if is_input:
                tensor["profile"] = [list(shape) for shape in self.engine.get_tensor_profile_shape(name, 0)]
            found.append(tensor)
        return found

    def _layer_information(self) -> list[Request]:
        inspector = self.engine.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        try:
            return [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
        except ValueError:
            return []

    def prepare(self, request: Request) -> Request:
        """Copy inputs to the device, allocate outputs, run once, capture a CUDA graph."""
        self._bind(request["inputs"])
        self._enqueue()
        self.cuda("cudaStreamSynchronize", self.stream)
        if request.get("cuda_graph", True):
            self.graph = self._captured()
        self.events = self.events or [self.cuda.new("cudaEventCreate") for _ in range(2)]
        self.prepared, self.stale = request, False
        return {"cuda_graph": self.graph is not None}

    def _captured(self) -> ctypes.c_void_p:
        """An executable CUDA graph of one run."""
        self.cuda("cudaStreamBeginCapture", self.stream, 2)
        captured = ctypes.c_void_p()
        try:
            self._enqueue()
        except RuntimeError:  # a stream that is left in capture mode refuses everything
            with contextlib.suppress(RuntimeError):
                self.cuda("cudaStreamEndCapture", self.stream, ctypes.byref(captured))
            raise
        self.cuda("cudaStreamEndCapture", self.stream, ctypes.byref(captured))
        graph: ctypes.c_void_p = self.cuda.new("cudaGraphInstantiateWithFlags", captured, ctypes.c_ulonglong(0))
        self.cuda("cudaGraphDestroy", captured)
        return graph

    def _bind(self, inputs: Sequence[Request]) -> None:
        if self.graph is not None:  # it was captured with the addresses that are freed now
            self.cuda("cudaGraphExecDestroy", self.graph)
            self.graph = None
        self.stale = True
        self._free()
        for item in inputs:
            with open(item["path"], "rb") as file:
                data = file.read()
            self.context.set_input_shape(item["name"], tuple(item["shape"]))
            pointer = self._allocate(item["name"], len(data))
            self.cuda("cudaMemcpy", pointer, data, ctypes.c_size_t(len(data)), 1)
        for tensor in self._tensors():
            if not tensor["input"]:
                shape = tuple(self.context.get_tensor_shape(tensor["name"]))
                self._allocate(tensor["name"], math.prod(shape) * BYTES[tensor["dtype"]], shape, tensor["dtype"])

    def _allocate(self, name: str, size: int, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> ctypes.c_void_p:
        pointer: ctypes.c_void_p = self.cuda.new("cudaMalloc", ctypes.c_size_t(max(size, 1)))
        self.buffers[name] = (pointer, size, shape, dtype)
        self.context.set_tensor_address(name, pointer.value)
        return pointer

    def _free(self) -> None:
        for pointer, _, _, _ in self.buffers.values():
            self.cuda("cudaFree", pointer)
        self.buffers.clear()

    def _enqueue(self, context: Any = None) -> None:
        if not (context or self.context).execute_async_v3(self.stream.value):
            raise RuntimeError("the engine refuses to run: " + "; ".join(self.messages[-3:]))

    def run(self, request: Request) -> Request:
        """Outputs for inputs, as files of raw bytes."""
        self._bind(request["inputs"])
        self._enqueue()
        self.cuda("cudaStreamSynchronize", self.stream)
        outputs: list[Request] = []
        for name, (pointer, size, shape, dtype) in self.buffers.items():
            if shape is None:
                continue
            data = ctypes.create_string_buffer(size)
            self.cuda("cudaMemcpy", data, pointer, ctypes.c_size_t(size), 2)
            path = os.path.join(request["folder"], f"output-{len(outputs)}.bin")
            with open(path, "wb") as file:
                file.write(data.raw)
            outputs.append({"name": name, "shape": list(shape), "dtype": dtype, "path": path})
        return {"outputs": outputs}

    def time(self, request: Request) -> Request:
        """One sample: `count` runs between two events."""
        if self.stale:
            self.prepare(self.prepared)
        start, end = self.events
        begun = time.perf_counter()
        self.cuda("cudaEventRecord", start, self.stream)
        for _ in range(request["count"]):
            if self.graph is not None:
                self.cuda("cudaGraphLaunch", self.graph, self.stream)
            else:
                self._enqueue()
        self.cuda("cudaEventRecord", end, self.stream)
        enqueued = time.perf_counter()
        self.cuda("cudaEventSynchronize", end)
        finished = time.perf_counter()
        return {"gpu_s": self.cuda.elapsed_ms(start, end) / 1e3, "host_s": finished - begun, "enqueue_s": enqueued - begun}

    def profile(self, request: Request) -> Request:
        """Median time per layer, from a context of its own with a profiler attached."""
        trt = self.trt
        times: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name: str, milliseconds: float) -> None:
                times.setdefault(name, []).append(milliseconds)

        # Before TensorRT 10 a profile belongs to one context, so the main one is used there, and replaced afterwards.
        own = not self._weak()
        context = self.engine.create_execution_context() if own else self.context
        for name, (pointer, _, shape, _) in self.buffers.items() if own else ():
            if shape is None:
                context.set_input_shape(name, tuple(self.context.get_tensor_shape(name)))
            context.set_tensor_address(name, pointer.value)
        profiler = Profiler()
        context.profiler = profiler
        try:
            for k in range(request["runs"] + 5):
                if k == 5:
                    times.clear()  # warm now
                self._enqueue(context)
                self.cuda("cudaStreamSynchronize", self.stream)
        finally:
            del context
            if not own:
                self.context = None
                self.context = self.engine.create_execution_context()
                self.stale = True
        return {
            "layers": [{"name": name, "median_ms": statistics.median(found), "times_ms": found} for name, found in times.items()]
        }


def _progress_monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            answer({"progress": [phase_name, parent_phase, 0, num_steps]})

        def phase_finish(self, phase_name: str) -> None:
            answer({"progress": [phase_name, None, self.steps.get(phase_name, 0), self.steps.pop(phase_name, 0)]})

        def step_complete(self, phase_name: str, step: int) -> bool:
            answer({"progress": [phase_name, None, step, self.steps.get(phase_name, 0)]})
            return True  # go on

    return Monitor()


def answer(message: Request) -> None:
    """One line to whoever asked; progress comes from the builder's threads."""
    with LOCK:
        OUT.write(json.dumps(message) + "\n")
        OUT.flush()


def main() -> None:
    """Serve until stdin ends."""
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(sys.argv[1])
            answer(dict(getattr(worker, request["op"])(request), ok=True))
        except Exception as error:
            answer({"ok": False, "error": str(error), "kind": type(error).__name__})


if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))  # it holds a tensorrt.py that is not the package
    sys.path[:] = [p for p in sys.path if os.path.realpath(p) != here]
    LOCK = threading.Lock()
    OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints goes to stderr
    main()
