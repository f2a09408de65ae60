"""A detector: YOLOv8n of Ultralytics (AGPL-3.0) finds digits in scenes; its own loss, mAP as COCO counts it.

pip install 'fx-compressor[tasks]' ultralytics scikit-learn
python examples/05_detection.py
"""

import sys

import torch
from common import box_batch, box_targets, fit, scenes
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.nms import TorchNMS

import compressor
from compressor import Budget, FineTune, tasks

SIZE = 96


def predictions(outputs):
    """Boxes, scores and labels of every picture, without those that overlap a better one of their class."""
    found = []
    for centre, size, classes in zip(*outputs[0].transpose(1, 2).split((2, 2, 10), 2), strict=True):
        scores, labels = classes.max(1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
        kept = TorchNMS.nms(boxes + SIZE * labels[:, None], scores, 0.6)[:100]
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found


def main(out="runs/detection", scenes_used=1200, epochs=20):
    """Returns the result."""
    torch.manual_seed(0)
    pictures, _, boxes = scenes(scenes_used, SIZE)
    data = [box_batch(pictures[k : k + 16], boxes[k : k + 16]) for k in range(0, scenes_used, 16)]
    few = len(data) // 6
    model = DetectionModel("yolov8n.yaml", ch=3, nc=10, verbose=False)
    model.args = get_cfg()
    criterion = v8DetectionLoss(model)

    def loss(outputs, batch):
        """In eval mode, and so in a graph, the network gives boxes and what the loss reads."""
        return criterion(outputs[1] if isinstance(outputs, tuple) else outputs, batch)[0].sum() / len(batch["img"])

    task = tasks.detection(loss, predictions, box_targets, inputs=lambda batch: batch["img"])
    fit(model, data[2 * few :], task, epochs, 2e-3)
    return compressor.compress(
        model, (data[0]["img"][:1],), task=task, train=data[2 * few :], validate=data[:few], test=data[few : 2 * few],
        budget=Budget(latency=0.5), finetune=FineTune(epochs=3, learning_rate=0.001), out=out,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:]).summary())
