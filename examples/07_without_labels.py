"""No labels, no task: a folder of pictures is enough; the network is judged by how far it agrees with the original.

pip install 'fx-compressor[images]' timm
python examples/07_without_labels.py FOLDER
"""

import sys

import timm
import torch

import compressor
from compressor import Budget, Mimic
from compressor.data.images import load_images


def main(folder, out="runs/without-labels", model="mobilenetv3_small_050", steps=300):
    """Returns the result."""
    network = timm.create_model(model, pretrained=False)  # with weights of your own
    pictures = load_images(folder, batch=32, limit=500)
    return compressor.compress(
        network.eval(), (torch.zeros(1, *pictures.images.shape[1:]),), calibrate=pictures, budget=Budget(latency=0.7),
        finetune=Mimic(steps=steps), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
