"""What every process of `zoo.py` needs, imported once by the server that they are forked from."""

import importlib

import torch

from tools import torchvision_ops

torchvision_ops.declare()
for name in ("torchvision", "timm", "torch.export", "compressor", "compressor.runtime.onnx.export"):
    importlib.import_module(name)
torch.set_num_threads(1)
