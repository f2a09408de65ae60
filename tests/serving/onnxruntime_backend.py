"""A python-based Triton back end named `onnxruntime`: lets a tritonserver without the C++ one serve ONNX repositories."""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"), options)
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]

    def execute(self, requests):
        """Requests that arrived together run as one batch, as Triton's own back end does."""
        feeds = [{n: pb_utils.get_input_tensor_by_name(r, n).as_numpy() for n in self.inputs} for r in requests]
        sizes = [len(feed[self.inputs[0]]) for feed in feeds]
        results = self.session.run(None, {n: np.concatenate([feed[n] for feed in feeds]) for n in self.inputs})
        parts = [np.split(result, np.cumsum(sizes)[:-1]) for result in results]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, np.ascontiguousarray(p[k])) for n, p in zip(self.outputs, parts, strict=True)]
            )
            for k in range(len(requests))
        ]
