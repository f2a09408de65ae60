"""Hugging Face models as they are: a ResNet classifier and a SegFormer (random weights, small, trained here).

pip install 'fx-compressor[tasks]' transformers scikit-learn
python examples/06_hugging_face.py
"""

import sys

import torch
from common import batches, fit, scenes
from transformers import ResNetConfig, ResNetForImageClassification, SegformerConfig, SegformerForSemanticSegmentation

import compressor
from compressor import Budget, FineTune, tasks


def classifier():
    """Model and task."""
    names = {k: str(k) for k in range(10)}
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]}
    config = ResNetConfig(num_channels=1, layer_type="basic", id2label=names, **sizes)
    return ResNetForImageClassification(config), tasks.classification()


def segmenter():
    """The same of a segmenter, whose masks are four times as large as its logits."""
    config = SegformerConfig(
        num_channels=1, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], decoder_hidden_size=64,
        num_attention_heads=[1, 1, 2, 4], id2label={k: str(k) for k in range(11)},
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config), tasks.segmentation(classes=11)


def main(out="runs/hugging-face", which="classifier", scenes_used=900, epochs=12):
    """Returns the result."""
    torch.manual_seed(0)
    pictures, masks, boxes = scenes(scenes_used, size=64, most=1)
    labels = torch.tensor([int(own[0, 0]) for own in boxes])
    model, task = classifier() if which == "classifier" else segmenter()
    data = batches(pictures, labels if which == "classifier" else masks)
    few = len(data) // 6
    fit(model, data[2 * few :], task, epochs)
    return compressor.compress(
        model, (pictures[:1],), task=task, train=data[2 * few :], validate=data[:few], test=data[few : 2 * few],
        budget=Budget(latency=0.5), finetune=FineTune(epochs=2), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
