"""`Trial`: a structure that was tried, what it cost, and where the numbers come from."""

from dataclasses import dataclass

from compressor.values.measurement import Measurement
from compressor.values.plan import Structure


@dataclass(frozen=True)
class Trial:
    """One measured candidate.

    Attributes:
        structure: What was built.
        measurement: Its times.
        original: Times of the original network, interleaved with them.
    """

    structure: Structure
    measurement: Measurement
    original: Measurement

    @property
    def ratio(self) -> float:
        """Latency over the original's, from the same session."""
        return self.measurement.ratio_to(self.original)
