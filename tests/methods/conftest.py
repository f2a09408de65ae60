"""Fixtures: digits, and a network trained on them."""

import pytest
import torch
from sklearn.datasets import load_digits

from compressor import FineTune
from compressor.train import train
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
