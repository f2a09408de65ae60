"""Real digits, and a small residual network for them."""

import torch
from torch import nn


class Net(nn.Module):
    """A residual network for 8x8 digits."""

    def __init__(self, width=16):
        super().__init__()
        inside = width * 3 // 2
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside), nn.ReLU(),
                nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            ) for _ in range(2)
        )  # fmt: skip
        self.last = nn.Conv2d(width, 2 * width, 3, stride=2)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def pairs(data):
    return list(zip(*(part.split(50) for part in data), strict=True))
