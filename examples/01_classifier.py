"""A classifier at half of its measured latency: train, compress, look at the numbers.

pip install 'fx-compressor[demo]'
python examples/01_classifier.py
"""

import sys

import torch
from torch import nn

import compressor
from compressor.data.images import load_data


def main(out="runs/classifier", epochs=8):
    """Returns the result."""
    torch.manual_seed(0)
    data = load_data("digits")  # scikit-learn's real digits: train, validate (a hold-out of it) and test
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in data.train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return compressor.compress(
        model.eval(), (torch.zeros(1, 1, 8, 8),), train=data.train, validate=data.validate, test=data.test,
        budget=compressor.Budget(latency=0.5), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
