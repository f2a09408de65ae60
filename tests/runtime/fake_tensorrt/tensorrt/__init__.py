"""A TensorRT for tests without a GPU: the calls that `tensorrt_worker.py` makes, computed by ONNX Runtime.

It is as strict as the real one about order (an address for every tensor, shapes within the profile). `FAKE_TENSORRT` holds
its version and, behind a comma, a fault: `ignores-flags` builds FP32 whatever is asked for, as some have silently shipped.
"""

import ctypes
import enum
import json
import os
import types

import numpy as np
import onnx
import onnxruntime

__version__, _, FAULT = os.environ.get("FAKE_TENSORRT", "8.6.1").partition(",")
WEAK = int(__version__.split(".")[0]) < 10


def _enum(name, *members):
    return enum.IntEnum(name, {member: k for k, member in enumerate(members)})


Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
NetworkDefinitionCreationFlag = _enum("Flag", "EXPLICIT_BATCH", *(() if WEAK else ("STRONGLY_TYPED",)))
LayerType = _enum("LayerType", "CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "DEQUANTIZE", "OTHER")
BuilderFlag = _enum("BuilderFlag", "FP16", "INT8", "TF32", "VERSION_COMPATIBLE", "STRIP_PLAN")
ProfilingVerbosity = _enum("ProfilingVerbosity", "DETAILED")
TacticSource = _enum("TacticSource", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
TensorIOMode = _enum("TensorIOMode", "INPUT", "OUTPUT")
LayerInformationFormat = _enum("LayerInformationFormat", "JSON")
TYPES = {1: "FLOAT", 10: "HALF", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL"}
KINDS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 2, "MatMul": 2, "DequantizeLinear": 3}


class ILogger:
    Severity = Severity


class IProfiler:
    pass


def _named(name, code=1):
    return types.SimpleNamespace(name=name, dtype=types.SimpleNamespace(name=TYPES.get(code, "FLOAT")))


class _Network:
    def read(self, data):
        self.model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
        graph = self.model.graph
        values = [*graph.value_info, *graph.input, *graph.output]
        self.types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}
        stored = {t.name for t in graph.initializer}
        self.inputs = [v for v in graph.input if v.name not in stored]
        self.num_inputs, self.num_layers = len(self.inputs), len(graph.node)

    def get_input(self, k):
        sizes = [d.dim_value or -1 for d in self.inputs[k].type.tensor_type.shape.dim]
        return types.SimpleNamespace(name=self.inputs[k].name, shape=tuple(sizes))

    def get_layer(self, k):
        node = self.model.graph.node[k]
        found = types.SimpleNamespace(type=LayerType(KINDS.get(node.op_type, 4)), num_outputs=len(node.output))
        found.get_output = lambda i: _named(node.output[i])
        found.get_input = lambda i: _named(node.input[i], self.types.get(node.input[i], 1))
        return found


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.errors = network, []

    def parse_from_file(self, path):
        try:
            with open(path, "rb") as file:
                self.network.read(file.read())
        except Exception as error:
            self.errors.append(str(error))
        opset = 0 if self.errors else self.network.model.opset_import[0].version
        if WEAK and opset > 17:
            self.errors.append(f"opset {opset} is not known")
        return not self.errors

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, k):
        return self.errors[k]


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, best, most):
        assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)), "a profile's shapes in another order"
        self.shapes[name] = [list(least), list(best), list(most)]


class _Config:
    def __init__(self):
        self.flags, self.profiles, self.cache = set(), [], None

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def set_tactic_sources(self, sources):
        assert WEAK
        assert sources == 0b11, "cuBLAS and cuDNN may be stubs beside old releases"

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def create_timing_cache(self, data):
        return types.SimpleNamespace(serialize=lambda: bytes(data) or b"cache", combine=lambda other, ignore: True)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags):
        assert (flags == 1) == WEAK, "the networks of 10 and newer are strongly typed here"
        return _Network()

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        flags = [] if FAULT == "ignores-flags" else sorted(flag.name for flag in config.flags)
        about = {"flags": flags, "profile": config.profiles[0].shapes if config.profiles else {}}
        head = json.dumps(about).encode()
        return len(head).to_bytes(4, "little") + head + network.model.SerializeToString()


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        size = int.from_bytes(data[:4], "little")
        try:
            return _Engine(json.loads(data[4 : 4 + size]), data[4 + size :])
        except Exception as error:
            message = f"the engine is of another version or cut off: {error}"
            self.logger.log(Severity.ERROR, message)
            return None


class _Engine:
    device_memory_size = 4096

    def __init__(self, about, model):
        self.about, self.network = about, _Network()
        self.network.read(model)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.io = {v.name: v for v in (*self.network.inputs, *self.network.model.graph.output)}
        self.names, self.num_io_tensors = list(self.io), len(self.io)

    def get_tensor_name(self, k):
        return self.names[k]

    def get_tensor_mode(self, name):
        return TensorIOMode(int(name not in {v.name for v in self.network.inputs}))

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name=TYPES[self.io[name].type.tensor_type.elem_type])

    def get_tensor_shape(self, name):
        return tuple(d.dim_value or -1 for d in self.io[name].type.tensor_type.shape.dim)

    def get_tensor_profile_shape(self, name, k):
        return [tuple(shape) for shape in self.about["profile"].get(name, [self.get_tensor_shape(name)] * 3)]

    def create_engine_inspector(self):
        return types.SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": list(self._layers())}))

    def _layers(self):
        made = {name: node.op_type for node in self.network.model.graph.node for name in node.output}
        for node in self.network.model.graph.node:
            kind = TYPES.get(self.network.types.get(node.input[0], 1), "FLOAT") if node.input else "FLOAT"
            if WEAK and "FP16" in self.about["flags"]:
                kind = "HALF"
            if node.input and made.get(node.input[0]) == "DequantizeLinear" and (not WEAK or "INT8" in self.about["flags"]):
                kind = "INT8"
            said = {"FLOAT": "Row major linear FP32", "HALF": "Row major linear FP16 format", "INT8": "Int8"}.get(kind, kind)
            layer = "CaskConvolution" if node.op_type in KINDS and KINDS[node.op_type] < 3 else node.op_type
            dynamic = WEAK and any(-1 in self.get_tensor_shape(name) for name in self.io)  # old releases: the weights' type alone
            told = "N/A due to dynamic shapes" if dynamic else said
            inputs = [{"Name": node.input[0], "Format/Datatype": told}] if node.input else []
            weights = {"Weights": {"Type": kind.capitalize(), "Count": 1}} if layer == "CaskConvolution" else {}
            yield {"Name": node.name, "LayerType": layer, "Inputs": inputs, "Metadata": f"[ONNX Layer: {node.name}]", **weights}

    def create_execution_context(self):
        return _Context(self)


class _Context:
    profiler = None

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), "a shape outside of the profile"
        self.shapes[name] = tuple(shape)

    def get_tensor_shape(self, name):
        batch = next(iter(self.shapes.values()))[0]
        return self.shapes.get(name) or tuple(batch if d == -1 else d for d in self.engine.get_tensor_shape(name))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def _array(self, name):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.engine.io[name].type.tensor_type.elem_type)
        shape = self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)

    def execute_async_v3(self, stream):
        if set(self.addresses) != set(self.engine.names) or not stream:
            return False
        inputs = {v.name: self._array(v.name) for v in self.engine.network.inputs}
        outputs = [v.name for v in self.engine.network.model.graph.output]
        for name, value in zip(outputs, self.engine.session.run(outputs, inputs), strict=True):
            self._array(name)[...] = value
        if self.profiler is not None:
            for node in self.engine.network.model.graph.node:
                self.profiler.report_layer_time(node.name, 0.01)
        return True
