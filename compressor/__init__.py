"""Compress convolutional networks to a measured latency.

>>> import torch, compressor
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
>>> graph = compressor.trace(net, (torch.zeros(1, 3, 16, 16),))
>>> channels = compressor.analyze(graph)
>>> [(group.name, group.size, group.frozen) for group in channels.groups]
[('0', 8, None), ('2', 4, 'model output `_2`')]
>>> small = compressor.apply(channels.plan(0.5), graph)
>>> small.get_submodule("0")
Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
"""

from compressor import tasks
from compressor.api import analyze, apply, compress, export, finish, load, profile, trace
from compressor.data.onnx_models import from_onnx
from compressor.errors import BackendError, BudgetError, CompressorError, DataError, PassError, PlanError, TraceError
from compressor.methods import AACP, CC, CaP, Factorize, LeGR, Magnitude
from compressor.passes.fitting.settings import Compensation
from compressor.runs.result import Result
from compressor.search.fitness import Fitness
from compressor.tasks import Metric, Task
from compressor.training.by_function import Context
from compressor.training.fine_tune import FineTune
from compressor.training.mimic import Mimic
from compressor.values.budget import Budget
from compressor.values.measurement import Measurement
from compressor.values.plan import Factorization, Plan, Structure
from compressor.values.progress import Progress
from compressor.values.target import Target
from compressor.version import __version__

__all__ = [
    "AACP",
    "BackendError",
    "Budget",
    "BudgetError",
    "CC",
    "CaP",
    "Compensation",
    "CompressorError",
    "Context",
    "DataError",
    "Factorization",
    "Factorize",
    "FineTune",
    "Fitness",
    "LeGR",
    "Magnitude",
    "Measurement",
    "Metric",
    "Mimic",
    "PassError",
    "Plan",
    "PlanError",
    "Progress",
    "Result",
    "Structure",
    "Target",
    "Task",
    "TraceError",
    "__version__",
    "analyze",
    "apply",
    "compress",
    "export",
    "finish",
    "from_onnx",
    "load",
    "profile",
    "tasks",
    "trace",
]
