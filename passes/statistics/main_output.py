"""The one output that a ready task is about, of networks that give more than a tensor."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compressor.errors import DataError
from compressor.passes.tracing.trace import outputs_of

_NAMES = ("logits", "out")  # of Hugging Face, of torchvision's segmenters


def main_output(outputs: Any) -> Tensor:
    """The tensor itself; of a dict or dataclass `logits` or `out`; else the first of floating point.

    Raises:
        DataError: There is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in _NAMES:
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    floats = [x for x in outputs_of(outputs) if x.is_floating_point()]
    if not floats:
        raise DataError("none of the network's outputs is a tensor of floating point")
    return floats[0]
