"""`Measurement`: raw times of one engine on one target, and what follows from them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from compressor.errors import DataError

SCHEMA = 1
CPU = "cpu"
"""The clock of a contended measurement."""


@dataclass(frozen=True)
class Measurement:
    """Times of one engine. Never compare measurements of different targets.

    Attributes:
        times_ms: Retained raw samples in milliseconds, in the order they were taken.
        discarded: Samples left out because something else ran on the core, or the clock had dropped.
        status: `ok`; `unstable` (the interval did not get narrow enough); `contended` (over half of the
            samples were disturbed: `times_ms` then holds CPU times instead of wall times); `throttled` (the
            device lowered its clock, for heat or a slow-down signal, in over a fifth of the samples).
        target: Fingerprint of the target.
        session: Names one run of interleaved measurements; ratios within a session are the sharpest.
        blocks: For every retained sample the block it was taken in: samples of a session with the same block
            were taken within moments of each other.
        raw_ms: Every sample in wall time, discarded ones too; percentiles are of these.
        details: What else was seen: clocks, the sentinel's drift, enqueue times, memory, warnings.
    """

    times_ms: tuple[float, ...]
    discarded: int
    status: str
    target: Mapping[str, object]
    session: str
    blocks: tuple[int, ...] = ()
    raw_ms: tuple[float, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def median_ms(self) -> float:
        """Median of the samples: the latency."""
        return float(np.median(self.times_ms))

    @cached_property
    def interval_ms(self) -> tuple[float, float]:
        """95 % interval of the median."""
        return median_interval(np.asarray(self.times_ms))

    @property
    def clock(self) -> str:
        """What the samples are: `wall` time, or `cpu` time where most of them were disturbed by other work."""
        return str(self.details.get("clock", "wall"))

    @property
    def variation(self) -> float:
        """Coefficient of variation of the samples (trtexec calls a run unstable from 2.5 % on)."""
        return float(np.std(self.times_ms) / np.mean(self.times_ms))

    def percentile_ms(self, percent: float) -> float | None:
        """A percentile of the raw samples (nothing trimmed; CPU times where these stand in), or None for too few of them.

        Args:
            percent: Such as 90 or 99.
        """
        samples = self.times_ms if self.clock == CPU or not self.raw_ms else self.raw_ms
        if len(samples) < samples_for(percent):
            return None
        return float(np.percentile(samples, percent))

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
        note = "" if self.status == "ok" else f" ({self.status}{': CPU times' if self.clock == CPU else ''})"
        return f"{self.median_ms:.3f} ms [{low:.3f}, {high:.3f}]{note}"

    def to_dict(self) -> dict[str, object]:
        """Plain data: the raw samples first of all, derived numbers for readers."""
        data: dict[str, object] = {"schema_version": SCHEMA, **asdict(self)}
        data["latency_ms"] = self.summary()
        return data

    def summary(self) -> dict[str, object]:
        """The derived numbers: median, interval, mean, variation, minimum, percentiles, counts."""
        return {
            "median": self.median_ms,
            "ci95": list(self.interval_ms),
            "mean": float(np.mean(self.times_ms)),
            "cv": self.variation,
            "min": min(self.times_ms),
            **{f"p{q}": self.percentile_ms(q) for q in (90, 95, 99)},
            "n": len(self.times_ms),
            "n_discarded": self.discarded,
            "clock": self.clock,
        }

    @classmethod
    def from_dict(cls, data: object) -> "Measurement":
        """Read what `to_dict` wrote.

        Raises:
            DataError: A field is missing or of the wrong kind; it is named.
        """
        try:
            plain = json.loads(json.dumps(data))  # only plain data gets through
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"measurement: no plain data ({error})") from error
        if not isinstance(plain, dict):
            raise DataError(f"measurement: must be an object, found {type(plain).__name__}")
        for name, kind in (("times_ms", list), ("discarded", int), ("status", str), ("target", dict), ("session", str)):
            if not isinstance(plain.get(name), kind):
                raise DataError(f"measurement: field `{name}` must be a {kind.__name__}, found {plain.get(name)!r}")
        for name, kind in (("blocks", list), ("raw_ms", list), ("details", dict)):  # since 0.3
            if not isinstance(plain.get(name, kind()), kind):
                raise DataError(f"measurement: field `{name}` must be a {kind.__name__}, found {plain.get(name)!r}")
        times, raw = _times("times_ms", plain["times_ms"]), _times("raw_ms", plain.get("raw_ms", []))
        if not times:
            raise DataError("measurement: field `times_ms` must hold finite times")
        if not all(isinstance(b, int) for b in plain.get("blocks", [])):
            raise DataError("measurement: field `blocks` must hold whole numbers")
        blocks = tuple(plain.get("blocks", []))
        return cls(
            times, plain["discarded"], plain["status"], plain["target"], plain["session"], blocks, raw, plain.get("details", {})
        )


def _times(name: str, values: list[object]) -> tuple[float, ...]:
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e12 for v in values):
        raise DataError(f"measurement: field `{name}` must hold finite times")
    return tuple(float(v) for v in values if isinstance(v, int | float))


@dataclass(frozen=True)
class Contest:
    """Two engines of one session against each other.

    Attributes:
        ratio: Median over blocks of the one's time over the other's in the same block.
        interval: 95 % interval of that median.
        floor: Relative difference that two measurements of one and the same engine may show.
    """

    ratio: float
    interval: tuple[float, float]
    floor: float

    @property
    def winner(self) -> int:
        """-1 where the first is faster, 1 where the second is, 0 where they cannot be told apart."""
        if self.interval[1] < 1 - self.floor:
            return -1
        return 1 if self.interval[0] > 1 + self.floor else 0


def contest(one: Measurement, other: Measurement, floor: float = 0.005) -> Contest:
    """Compare two measurements of a session block by block, so that what slows both down cancels out.

    Args:
        one: A measurement.
        other: Another one of the same session and target.
        floor: See `Contest`; `time_together` records the session's as `details["noise_floor"]`.

    Raises:
        DataError: They are not of one session.
    """
    if one.session != other.session or dict(one.target) != dict(other.target):
        raise DataError("only measurements of one session can be compared block by block")
    mine, theirs = dict(zip(one.blocks, one.times_ms, strict=False)), dict(zip(other.blocks, other.times_ms, strict=False))
    shared = [mine[b] / theirs[b] for b in mine if b in theirs]
    if len(shared) < 6:  # fewer have no 95 % interval
        return Contest(one.median_ms / other.median_ms, (0.0, math.inf), floor)
    ratios = np.asarray(shared)
    return Contest(float(np.median(ratios)), median_interval(ratios), floor)


def median_interval(times: NDArray[np.floating]) -> tuple[float, float]:
    """95 % interval of the median from order statistics: no assumption about the distribution, no randomness.

    The number of samples below the true median is binomial(n, 1/2), so the k-th smallest and k-th largest
    enclose it with at least 95 % probability, for the largest k with P(fewer than k below) <= 2.5 %. (The
    percentile bootstrap covers only 93 to 94 % at 30 to 200 samples: `tests/values/test_measurement.py`.)
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


@cache
def samples_for(percent: float) -> int:
    """How many samples a percentile needs: 64 for the 90th, 662 for the 99th.

    The rule of MLPerf's early stopping: the smallest n at which one or no sample above the percentile would be a
    1 % event, P(binomial(n, 1 - q) <= 1) <= 0.01.
    """
    q = percent / 100
    count = 2
    while q**count + count * (1 - q) * q ** (count - 1) > 0.01:
        count += 1
    return count
