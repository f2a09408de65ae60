"""Two inputs and a dict of two outputs: picture and depth give a mask and its edge. A task of one's own in a few lines.

pip install 'fx-compressor[tasks]' scikit-learn
python examples/04_two_inputs.py
"""

import sys

import torch
import torch.nn.functional as F
from common import fit, scenes
from torch import nn
from torchmetrics.classification import BinaryJaccardIndex

import compressor
from compressor import Budget, FineTune, Metric, Task


class TwoEyes(nn.Module):
    """Each input has a layer of its own; what they give is concatenated."""

    def __init__(self, width=24):
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(1, width, 3, padding=1)
        layers = [[nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()] for _ in range(3)]
        self.body = nn.Sequential(*(layer for part in layers for layer in part))
        self.mask, self.edge = nn.Conv2d(2 * width, 1, 1), nn.Conv2d(2 * width, 1, 1)

    def forward(self, rgb, depth):
        """Two pictures (N, 1, H, W); `mask` and `edge` are logits (N, 1, H, W)."""
        both = self.body(torch.cat([F.relu(self.rgb(rgb)), F.relu(self.depth(depth))], 1))
        return {"mask": self.mask(both), "edge": self.edge(both)}


task = Task(
    inputs=lambda batch: {"rgb": batch["rgb"], "depth": batch["depth"]},
    loss=lambda y, batch: sum(F.binary_cross_entropy_with_logits(y[name], batch[name]) for name in ("mask", "edge")),
    metric=Metric.of(BinaryJaccardIndex(), lambda y, batch: (y["mask"], batch["mask"].int())),
)


def main(out="runs/two-inputs", scenes_used=600, epochs=6):
    """Returns the result."""
    torch.manual_seed(0)
    rgb, masks, _ = scenes(scenes_used, size=32, most=2)
    mask = (masks > 0).float()[:, None]
    edge = mask - (-F.max_pool2d(-mask, 3, 1, 1))
    whole = {"rgb": rgb, "depth": 0.5 * mask + 0.2 * torch.randn(mask.shape), "mask": mask, "edge": edge}
    data = [{name: own[k : k + 32] for name, own in whole.items()} for k in range(0, scenes_used, 32)]
    model, few = TwoEyes(), max(len(data) // 6, 1)
    fit(model, data[2 * few :], task, epochs)
    return compressor.compress(
        model, (rgb[:1], rgb[:1]), task=task, train=data[2 * few :], validate=data[:few], test=data[few : 2 * few],
        budget=Budget(latency=0.5), finetune=FineTune(epochs=2), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
