"""`Measurement`: raw times of one engine on one target, and what follows from them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property

import numpy as np

from compressor.errors import DataError

SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """Times of one engine. Never compare measurements of different targets.

    Attributes:
        times_ms: Retained raw samples in milliseconds, in the order they were taken.
        discarded: Samples left out because something else ran on the core.
        status: `ok`; `unstable` (the interval did not get narrow enough); or `contended` (over half of the
            samples were disturbed: `times_ms` then holds CPU times instead of wall times).
        target: Fingerprint of the target.
        session: Names one run of interleaved measurements; ratios within a session are the sharpest.
    """

    times_ms: tuple[float, ...]
    discarded: int
    status: str
    target: Mapping[str, object]
    session: str

    @cached_property
    def median_ms(self) -> float:
        """Median of the samples: the latency."""
        return float(np.median(self.times_ms))

    @cached_property
    def interval_ms(self) -> tuple[float, float]:
        """95 % interval of the median."""
        return median_interval(np.asarray(self.times_ms))

    def ratio_to(self, other: "Measurement") -> float:
        """This latency over another one on the same target.

        Raises:
            DataError: The targets differ.
        """
        if dict(self.target) != dict(other.target):
            raise DataError("these measurements were taken on different targets; their ratio means nothing")
        return self.median_ms / other.median_ms

    def __str__(self) -> str:
        """`1.234 ms [1.230, 1.240]`, and the status where it is not ok."""
        low, high = self.interval_ms
        note = "" if self.status == "ok" else f" ({self.status})"
        return f"{self.median_ms:.3f} ms [{low:.3f}, {high:.3f}]{note}"

    def to_dict(self) -> dict[str, object]:
        """Plain data: the raw samples first of all, derived numbers for readers."""
        data: dict[str, object] = {"schema_version": SCHEMA, **asdict(self)}
        data["latency_ms"] = {
            "median": self.median_ms,
            "ci95": list(self.interval_ms),
            "min": min(self.times_ms),
            "n": len(self.times_ms),
            "n_discarded": self.discarded,
        }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Measurement":
        """Read what `to_dict` wrote.

        Raises:
            DataError: A field is missing or of the wrong kind; it is named.
        """
        text = json.dumps(data)  # only plain data gets through
        plain = json.loads(text)
        for name, kind in (("times_ms", list), ("discarded", int), ("status", str), ("target", dict), ("session", str)):
            if not isinstance(plain.get(name), kind):
                raise DataError(f"measurement: field `{name}` must be a {kind.__name__}, found {plain.get(name)!r}")
        times = tuple(float(t) for t in plain["times_ms"])
        if not times or not all(np.isfinite(times)):
            raise DataError("measurement: field `times_ms` must hold finite times")
        return cls(times, plain["discarded"], plain["status"], plain["target"], plain["session"])


def median_interval(times: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median from order statistics: no assumption about the distribution, no randomness.

    The number of samples below the true median is binomial(n, 1/2), so the k-th smallest and k-th largest
    enclose it with at least 95 % probability, for the largest k with P(fewer than k below) <= 2.5 %.
    """
    ordered = np.sort(times)
    k = _interval_rank(len(ordered))
    return float(ordered[k - 1]), float(ordered[-k])


@cache
def _interval_rank(count: int) -> int:
    """The k above; 1 where there are too few samples for 95 %."""
    tail, k = 1, 0  # P(fewer than k + 1 below) times 2^count
    while tail * 40 <= 2**count:
        k += 1
        tail += math.comb(count, k)
    return max(k, 1)
