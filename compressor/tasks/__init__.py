"""What a network is for: what of a batch it reads, what its loss is, and what it is judged by. A file for every ready task."""

from collections.abc import Callable

from compressor.tasks.classification import classification
from compressor.tasks.detection import detection
from compressor.tasks.image_to_image import image_to_image
from compressor.tasks.metric import Meter, Metric
from compressor.tasks.multi_label import multi_label
from compressor.tasks.regression import regression
from compressor.tasks.samples import Batches, Samples, samples_of
from compressor.tasks.segmentation import segmentation
from compressor.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "image-to-image": image_to_image,
    "multi-label": multi_label,
    "regression": regression,
    "segmentation": segmentation,
}
"""By the name that the command knows; `detection` needs the detector's own loss, which the command takes as a callable."""

__all__ = [
    "TASKS",
    "Batches",
    "Meter",
    "Metric",
    "Samples",
    "Task",
    "classification",
    "detection",
    "image_to_image",
    "multi_label",
    "regression",
    "samples_of",
    "segmentation",
]
