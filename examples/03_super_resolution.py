"""Super-resolution: twice the width and height (PReLU, pixel shuffle) on scikit-image's photographs; judged by PSNR.

pip install 'fx-compressor[tasks]' scikit-image
python examples/03_super_resolution.py
"""

import sys

import torch
import torch.nn.functional as F
from common import batches, fit
from skimage import data
from torch import nn

import compressor
from compressor import Budget, FineTune, tasks


def patches(names, size=48):
    """Patches (N, 3, size, size) of photographs, in 0..1."""
    photographs = [torch.from_numpy(getattr(data, name)()[..., :3].copy()).permute(2, 0, 1) / 255 for name in names]
    cut = [photo.unfold(1, size, size).unfold(2, size, size).reshape(3, -1, size, size).transpose(0, 1) for photo in photographs]
    return torch.cat(cut)


class Upscaler(nn.Module):
    """Adds to the interpolated picture what a few residual blocks find."""

    def __init__(self, width=32, blocks=4):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        parts = [
            [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width), nn.Conv2d(width, width, 3, padding=1)] for _ in range(blocks)
        ]
        self.blocks = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, x):
        """(N, 3, H, W) to (N, 3, 2 H, 2 W)."""
        y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        return F.pixel_shuffle(self.last(y), 2) + F.interpolate(x, scale_factor=2.0, mode="bilinear")


def main(out="runs/super-resolution", epochs=25):
    """Returns the result."""
    torch.manual_seed(0)
    parts = [patches(names) for names in (("astronaut", "rocket", "retina"), ("coffee",), ("chelsea",))]
    train, validate, test = (batches(F.avg_pool2d(fine, 2), fine) for fine in parts)
    model, task = Upscaler(), tasks.image_to_image()
    fit(model, train, task, epochs, 1e-3)
    return compressor.compress(
        model, (torch.zeros(1, 3, 24, 24),), task=task, train=train, validate=validate, test=test,
        budget=Budget(latency=0.5), finetune=FineTune(epochs=3, learning_rate=0.001), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
