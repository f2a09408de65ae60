"""The timing protocol: several engines, interleaved in random order, disturbed samples dropped.

1. Every engine warms up for at least 0.2 s and 10 runs, and until the medians of the last two 50-ms windows agree
   within 1 % (5 s at most). A sample is then as many runs as take 5 ms or more.
2. A block is one sample of every engine in random order, so that a slow minute of the machine hits all alike. Where a
   sentinel is given (a small fixed network), it takes part twice: what the two lanes differ by is the noise floor.
3. A sample is retained if nothing else took the core (no involuntary context switch and, on one thread, wall
   time within 5 % of CPU time; on several, no time stolen from the machine), and the device's clock had not dropped:
   no slow-down for heat, not more than 5 % below the session's median clock. Clocks are read from a side thread.
4. Blocks go on until every engine's 95 % interval of the median is within +-1 %, 30 samples at least,
   500 at most, or until the time is over (`unstable`).
   One session of a user's processes at a time: others wait for it, so that searches that share a machine do not slow each other.
5. Where more than half of an engine's samples are disturbed, its CPU times stand in and it is `contended`; where
   the clock had dropped in more than a fifth, it is `throttled`; where the sentinel drifts by more than 2 % between
   the two halves of a session, everything in it is `unstable`.
"""

import fcntl
import itertools
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np

from compressor.runtime.timing.clocks import ClockSampler, Source, summary_of
from compressor.runtime.timing.timers import Sample, Timer, process_timer
from compressor.values.files import cache_folder
from compressor.values.measurement import CPU, Measurement, contest, median_interval

__all__ = ["PROTOCOL", "Protocol", "Sample", "Timer", "process_timer", "time_together"]

logger = logging.getLogger(__name__)

PROTOCOL = "interleaved-2"
_PATIENCE_S = 120.0  # that a session waits for another one on this machine
_SENTINELS = (" sentinel a", " sentinel b")  # names no network can have


@dataclass(frozen=True)
class Protocol:
    """Numbers of the protocol.

    Attributes:
        warm_up_s: Least warm-up time per engine.
        settle_s: Most warm-up time per engine, where it does not become steady.
        sample_s: Least length of a sample.
        min_samples: Retained samples before the interval is looked at.
        max_samples: Samples after which an engine is done.
        half_width: Relative half width of the interval that is narrow enough.
        max_s: Time per engine after which the rest is given up.
    """

    warm_up_s: float = 0.2
    settle_s: float = 5.0
    sample_s: float = 5e-3
    min_samples: int = 30
    max_samples: int = 500
    half_width: float = 0.01
    max_s: float = 10.0


@dataclass
class _Lane:
    timer: Timer
    repeats: int = 1
    steady: bool = True
    taken: list[tuple[int, Sample]] = field(default_factory=list)
    done: bool = False


def time_together(
    timers: Mapping[str, Timer],
    target: Mapping[str, object],
    seed: int = 0,
    protocol: Protocol | None = None,
    *,
    sentinel: Timer | None = None,
    clocks: Source | None = None,
) -> dict[str, Measurement]:
    """Time engines by the protocol above.

    Args:
        timers: Name -> timer.
        target: Fingerprint that goes into the measurements.
        seed: Of the order within blocks.
        protocol: Other numbers than the default ones.
        sentinel: Timer of a small fixed workload on the same device, for the noise floor and drift.
        clocks: Where the device's clock is read; see `clocks.py`.

    Returns:
        Name -> measurement; all of one session.
    """
    rules = protocol or Protocol()
    everyone = {**timers, **(dict.fromkeys(_SENTINELS, sentinel) if sentinel is not None else {})}
    with _alone(), ClockSampler(clocks) as sampler:
        lanes = {name: _warmed_up(timer, rules) for name, timer in everyone.items()}
        order = random.Random(seed)
        spent, limit = 0.0, rules.max_s * len(lanes)
        for block in itertools.count():
            waiting = list(lanes.values())
            if all(lane.done for lane in waiting) or spent >= limit:
                break
            order.shuffle(waiting)
            for lane in waiting:
                spent += _take(lane, block, rules, sampler)
    session = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{seed}-{random.randrange(1 << 32):08x}"
    found = {name: _measurement(lane, rules, target, session) for name, lane in lanes.items()}
    seen = summary_of(sampler.readings)
    floor, drift = _sentinels(found)
    return {name: _flagged(found[name], floor, drift, seen) for name in timers}


@contextmanager
def _alone() -> Iterator[None]:
    """Other processes of this user that time something here wait until it is done: at once, both would be slower."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "timing.lock").open("wb")
    except OSError:  # no place for a lock
        yield
        return
    with lock:
        begun = time.monotonic()
        while time.monotonic() - begun < _PATIENCE_S:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        else:
            logger.warning("another process has been timing for %.0f s; times taken beside it may be too long", _PATIENCE_S)
        yield


def _warmed_up(timer: Timer, rules: Protocol) -> _Lane:
    """Run until the medians of two windows of 50 ms agree; the sample's repetitions follow from the last window."""
    begun = time.monotonic()
    spent, runs, windows = 0.0, 0, list[list[float]]([[]])
    # Both clocks count: a GPU's share of a call may be small, and a synthetic clock runs ahead of the real one.
    while max(spent, time.monotonic() - begun) < rules.settle_s and runs < 100_000:
        last = timer(1).wall_s
        spent, runs = spent + last, runs + 1
        windows[-1].append(last)
        if sum(windows[-1]) >= 0.05 and len(windows[-1]) >= 3:
            windows.append([])
        enough = max(spent, time.monotonic() - begun) >= rules.warm_up_s and runs >= 10
        if enough and _settled(windows):
            break
    typical = float(np.median(windows[-1] or windows[-2]))
    return _Lane(timer, max(1, int(np.ceil(rules.sample_s / max(typical, 1e-9)))), _settled(windows))


def _settled(windows: list[list[float]]) -> bool:
    full = [w for w in windows[:-1] if w][-2:]
    return len(full) == 2 and abs(float(np.median(full[1]) / np.median(full[0])) - 1) <= 0.01


def _take(lane: _Lane, block: int, rules: Protocol, sampler: ClockSampler) -> float:
    started = time.monotonic()
    sample = lane.timer(lane.repeats)
    reading = sampler.near((started + time.monotonic()) / 2)
    if reading is not None and sample.mhz is None:
        sample = replace(sample, mhz=reading.mhz, slowed=reading.slowed)
    lane.taken.append((block, sample))
    if not lane.done and len(lane.taken) % 10 == 0:
        times = _times(lane)[0]
        narrow = len(times) >= rules.min_samples and _narrow(times, rules)
        lane.done = narrow or len(lane.taken) >= rules.max_samples
    return sample.wall_s


def _times(lane: _Lane) -> tuple[list[float], list[int]]:
    """Milliseconds per run of retained samples, and their blocks."""
    clocks = [sample.mhz for _, sample in lane.taken if sample.mhz is not None]
    lowest = 0.95 * float(np.median(clocks)) if clocks else 0.0
    kept = [(b, s) for b, s in lane.taken if not s.disturbed and not _slow(s, lowest)]
    return [s.wall_s * 1e3 / lane.repeats for _, s in kept], [b for b, _ in kept]


def _slow(sample: Sample, lowest: float) -> bool:
    return sample.slowed or (sample.mhz is not None and sample.mhz < lowest)


def _narrow(times: Sequence[float], rules: Protocol) -> bool:
    low, high = median_interval(np.asarray(times))
    return (high - low) / 2 <= rules.half_width * float(np.median(times))


def _measurement(lane: _Lane, rules: Protocol, target: Mapping[str, object], session: str) -> Measurement:
    times, blocks = _times(lane)
    samples = [sample for _, sample in lane.taken]
    raw = tuple(s.wall_s * 1e3 / lane.repeats for s in samples)
    disturbed = sum(s.disturbed for s in samples)
    status = "ok" if len(times) >= rules.min_samples and _narrow(times, rules) else "unstable"
    details: dict[str, object] = {"repeats": lane.repeats, "warnings": list(_warnings(lane, times)), "disturbed": disturbed}
    for name in ("host_s", "enqueue_s"):
        values = [value / lane.repeats for s in samples if (value := getattr(s, name)) is not None]
        if values:
            details[name.replace("_s", "_ms")] = float(np.median(values)) * 1e3
    if len(samples) - disturbed - len(times) > len(samples) / 5:
        status = "throttled"
        times, blocks = (times, blocks) if times else (list(raw), [b for b, _ in lane.taken])
    elif disturbed > len(samples) / 2:
        logger.warning("timing: %d of %d samples were disturbed by other work; CPU times are reported", disturbed, len(samples))
        status = "contended"
        times, blocks = [s.cpu_s * 1e3 / lane.repeats for s in samples], [b for b, _ in lane.taken]
        details["clock"] = CPU
    return Measurement(tuple(times), len(samples) - len(times), status, target, session, tuple(blocks), raw, details)


def _warnings(lane: _Lane, times: Sequence[float]) -> Iterator[str]:
    if not lane.steady:
        yield "the warm-up did not become steady within 1 %"
    if times and np.std(times) > 0.025 * np.mean(times):
        yield f"the samples vary by {100 * np.std(times) / np.mean(times):.1f} % (coefficient of variation)"
    enqueue = [s.enqueue_s / s.wall_s for _, s in lane.taken if s.enqueue_s is not None]
    if enqueue and np.median(enqueue) > 0.8:
        yield "enqueueing takes over 0.8 of the GPU's time: the host is the limit"


def _sentinels(found: Mapping[str, Measurement]) -> tuple[float, dict[str, object]]:
    """Noise floor: the farthest that A/A's interval reaches from 1, at least 0.5 %. And the sentinel's drift."""
    if _SENTINELS[0] not in found:
        return 0.005, {}
    one, other = (found[name] for name in _SENTINELS)
    low, high = contest(one, other, 0.0).interval
    floor = float(np.clip(max(1 - low, high - 1), 0.005, 0.05))
    half = len(one.times_ms) // 2
    first, second = np.asarray(one.times_ms[:half]), np.asarray(one.times_ms[half:])
    ratio = float(np.median(second) / np.median(first)) if half else 1.0
    return floor, {"median_ms": one.median_ms, "ratio": ratio, "ci95": [low, high]}


def _flagged(found: Measurement, floor: float, drift: Mapping[str, object], clocks: Mapping[str, object]) -> Measurement:
    details: dict[str, object] = {**found.details, "noise_floor": floor}
    details.update({name: dict(value) for name, value in (("sentinel", drift), ("clocks", clocks)) if value})
    status = found.status
    change = drift.get("ratio", 1.0)
    if isinstance(change, float) and abs(change - 1) > 0.02:
        warnings = details["warnings"]
        assert isinstance(warnings, list)
        details["warnings"] = [*warnings, f"the sentinel drifted by {100 * (change - 1):+.1f} % during the session: measure again"]
        status = "unstable" if status == "ok" else status
    return replace(found, status=status, details=details)
