"""Settings of compensation, and what it reports of each layer."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from compressor.errors import DataError
from compressor.values.settings import check

_RANGES = {"ridge": (0, math.inf), "images": (8, math.inf), "positions": (1, math.inf), "memory_mb": (1, math.inf)}
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e6)  # the last leaves the weights as they are and fits the bias alone


@dataclass(frozen=True)
class Compensation:
    """Settings of compensation.

    Attributes:
        features: Whose features the layers are fitted on. `narrowed`: those of the network as repaired so far, towards the
            original's outputs; every layer behind the first change, in front of an addition also for what the shortcut has
            lost. `original`, as published: statistics of the original network, and only the layers that lost inputs.
        rescale: Scale each output to the original's variance, as the released code of CaP does.
        ridge: Share of the mean variance that is added to the diagonal, pulling towards the weights that are there. None: of
            several, the one whose fit on half of the images has the least error on the other half (by `original` the least of
            them): with few samples for many inputs the plain closed form fits noise.
        images: How many calibration images are read at most.
        positions: Of each image, sampled per layer.
        memory_mb: For activations before they go to files; matrices get half as much again.

    Raises:
        DataError: A setting is out of range.
    """

    features: Literal["narrowed", "original"] = "narrowed"
    rescale: bool = False
    ridge: float | None = None
    images: int = 2000
    positions: int = 24
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, DataError, _RANGES)

    @classmethod
    def published(cls, images: int = 2000, positions: int = 24) -> "Compensation":
        """As in the released code: statistics of the original network, only layers that lost inputs, variances kept."""
        return cls("original", rescale=True, images=images, positions=positions)

    @property
    def side_by_side(self) -> bool:
        """Whether layers are fitted beside the original as it runs, and not on its statistics."""
        return self.features == "narrowed"

    @property
    def ridges(self) -> tuple[float, ...]:
        """Those that are tried, the least first."""
        if self.ridge is not None:
            return (self.ridge,)
        return _RIDGES if self.side_by_side else _RIDGES[:1]

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Repair:
    """What was done to one layer.

    Attributes:
        layer: Its qualified name.
        before: E||y - W_S x - b||², summed over outputs, as a share of their variance: the error that narrowing makes.
        after: The same with the new weights.
        samples: Patches that the fit rests on.
        parts: Parts that it was fitted in, one after the other, because its matrix did not fit into the memory.
        ridge: The ridge that was needed, or that did best on images that the fit had not seen.
        held_out: The error on those images, where they were asked.
    """

    layer: str
    before: float
    after: float
    samples: int
    parts: int
    ridge: float
    held_out: float | None = None
