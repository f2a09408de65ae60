"""Training by one's own means: a function is given the compressed network, which trains like any other.

pip install 'fx-compressor[demo]'
python examples/08_own_training.py
"""

import sys
from itertools import pairwise

import torch
from common import fit
from torch import nn

import compressor
from compressor import Budget, tasks
from compressor.data.images import load_data


def finetune(model, context):
    """With a moving average of the weights, towards the original's outputs; any trainer will do."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for epoch in range(3):
        for images, labels in context.train:
            optimizer.zero_grad()
            outputs, wanted = model(images), context.original(images)
            loss = nn.functional.cross_entropy(outputs, labels) + nn.functional.mse_loss(outputs, wanted.detach())
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
        context.progress.tick(epoch + 1, 3, f"loss {float(loss.detach()):.3f}")
    model.load_state_dict(average.module.state_dict())


def main(out="runs/own-training", epochs=8):
    """Returns the result."""
    torch.manual_seed(0)
    data, widths = load_data("digits"), (1, 32, 64, 64)
    layers = [[nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in pairwise(widths)]
    body = [layer for part in layers for layer in part]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    fit(model, list(data.train), tasks.classification(), epochs)
    return compressor.compress(
        model, (torch.zeros(1, 1, 8, 8),), train=data.train, validate=data.validate, test=data.test, budget=Budget(latency=0.5),
        finetune=finetune, out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
