"""The package `torchmetrics`, which the ready tasks count by; who brings a metric of their own does not need it."""

import importlib
from typing import Any

from compressor.errors import DataError


def torch_metrics(task: str) -> Any:
    """The package.

    Args:
        task: Who needs it.

    Raises:
        DataError: It is not there.
    """
    try:
        package = importlib.import_module("torchmetrics")
        if task == "detection":
            importlib.import_module("torchmetrics.detection")
    except (ImportError, RuntimeError) as error:  # a torchvision of another build than torch raises the latter
        raise DataError(f"the task {task} counts by torchmetrics: pip install 'fx-compressor[tasks]' ({error})") from error
    return package
