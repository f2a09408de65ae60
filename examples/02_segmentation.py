"""A segmenter: a U-Net of segmentation_models_pytorch finds digits in scenes; judged by mIoU.

pip install 'fx-compressor[tasks]' segmentation-models-pytorch scikit-learn
python examples/02_segmentation.py
"""

import sys

import segmentation_models_pytorch as smp
import torch
from common import batches, fit, scenes

import compressor
from compressor import Budget, FineTune, tasks


def main(out="runs/segmentation", scenes_used=1200, epochs=60):
    """Returns the result."""
    torch.manual_seed(0)
    pictures, masks, _ = scenes(scenes_used)
    sixth = scenes_used // 6
    parts = ((0, sixth), (sixth, 2 * sixth), (2 * sixth, None))
    test, validate, train = (batches(pictures[start:end], masks[start:end]) for start, end in parts)
    model = smp.Unet(
        "timm-mobilenetv3_small_minimal_100", encoder_weights=None, in_channels=1, classes=11,
        decoder_channels=(64, 32, 16, 16, 8),
    )  # fmt: skip
    task = tasks.segmentation(classes=11)
    fit(model, train, task, epochs)
    return compressor.compress(
        model, (pictures[:1],), task=task, train=train, validate=validate, test=test, budget=Budget(latency=0.5),
        finetune=FineTune(epochs=2), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
