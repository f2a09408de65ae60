"""Images from images: super-resolution, denoising, restoration."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compressor.passes.statistics.distances import SquaredError
from compressor.tasks.metric import Metric, TorchMeter
from compressor.tasks.regression import pair_of_one_shape
from compressor.tasks.task import Task
from compressor.tasks.torch_metrics import torch_metrics


def image_to_image(data_range: float = 1.0) -> Task:
    """Super-resolution, denoising and the like: absolute error, and PSNR in dB over all pixels.

    Batches are `(inputs, wanted images)`, the wanted ones of the shape of the first output.

    Args:
        data_range: From the darkest to the brightest value that an image can have.

    Raises:
        DataError: The package `torchmetrics` is not there.
    """
    from_package = torch_metrics("image_to_image")

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.l1_loss(*pair_of_one_shape(outputs, batch[1]))

    def pairs(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return pair_of_one_shape(outputs, batch[1])

    def meter() -> TorchMeter:
        return TorchMeter(from_package.image.PeakSignalNoiseRatio(data_range=data_range), pairs)

    return Task(loss, Metric("PSNR", "dB", meter=meter), compare=SquaredError(), name="image-to-image")
