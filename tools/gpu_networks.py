"""The networks of `gpu_check.py`, traced once: the server that its steps are forked from imports this file.

`GPU_CHECK_NETWORKS` names those that are wanted. Nothing here touches CUDA or starts a thread: neither survives a fork.
"""

import os
import time

import torch

torch.set_num_threads(1)

from bench_latency_model import network  # noqa: E402 - after the number of threads

from compressor.values.progress import Progress  # noqa: E402 - the same

SIZES = {"resnet50": 224, "mobilenet_v2": 224, "resnet56": 32, "resnet20": 32}
NAMES = [name for name in os.environ.get("GPU_CHECK_NETWORKS", "").split(",") if name]
TRACED = {name: network(name, SIZES[name]) for name in NAMES}


def graph_of(name):
    """The traced network, with random weights: latencies depend on shapes alone."""
    if name not in TRACED:
        TRACED[name] = network(name, SIZES[name])
    return TRACED[name]


class Said(Progress):
    """Progress as lines with their time: a log of where the seconds went."""

    def __init__(self):
        self.begun = time.monotonic()

    def stage(self, text):
        print(f"   {time.monotonic() - self.begun:6.1f} s  {text}", flush=True)
