"""The networks of `gpu_check.py`, traced once: the server that its steps are forked from imports this file.

`GPU_CHECK_NETWORKS` names those that are wanted. Nothing here touches CUDA or starts a thread: neither survives a fork.
"""

import os

import torch

torch.set_num_threads(1)

from bench_latency_model import network  # noqa: E402 - after the number of threads

SIZES = {"resnet50": 224, "mobilenet_v2": 224, "resnet56": 32}
NAMES = [name for name in os.environ.get("GPU_CHECK_NETWORKS", "").split(",") if name]
TRACED = {name: network(name, SIZES[name]) for name in NAMES}


def graph_of(name):
    """The traced network, with random weights: latencies depend on shapes alone."""
    if name not in TRACED:
        TRACED[name] = network(name, SIZES[name])
    return TRACED[name]
