"""Fixtures: digits, a network trained on them, and the task to halve its MACs."""

import pytest
import torch
from sklearn.datasets import load_digits

import compressor
from compressor import FineTune, Target
from compressor.methods import Problem
from compressor.passes.statistics.calibration import Calibration
from compressor.training.fine_tune import train
from tests.methods.digits import Net, pairs


@pytest.fixture(scope="session")
def digits():
    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    y = torch.from_numpy(found.target)
    return {"train": (x[:1000], y[:1000]), "holdout": (x[1000:1400], y[1000:1400]), "test": (x[1400:], y[1400:])}


@pytest.fixture(scope="session")
def net(digits):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net()
    train(model, pairs(digits["train"]), FineTune(epochs=6, learning_rate=0.05, distillation=0.0))
    return model.eval()


@pytest.fixture(scope="session")
def steady(digits):
    """The task of a network trained in float64: in float32, rounding that differs between processors becomes another network."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = Net().double()
    data = [(x.double(), y) for x, y in pairs(digits["train"])]
    train(model, data, FineTune(epochs=6, learning_rate=0.05, distillation=0.0))
    return task(model.float().eval(), digits)


@pytest.fixture(scope="session")
def problem(net, digits):
    """The network, the digits, half its MACs."""
    return task(net, digits)


def task(net, digits):
    graph = compressor.trace(net, (torch.zeros(2, 1, 8, 8),))
    channels = compressor.analyze(graph)
    full = float(channels.costs_of(channels.full).macs[0])
    calibration = Calibration.read([(x,) for x, _ in pairs(digits["train"])], graph, 300)
    return Problem(
        channels, {"macs": 0.5 * full}, Target("fake", align=1), None, pairs(digits["train"]), 0, pairs(digits["holdout"]),
        calibration,
    )  # fmt: skip
