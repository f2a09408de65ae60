"""The timing protocol: several engines, interleaved in random order, disturbed samples dropped.

1. Every engine warms up for at least 0.2 s and 10 runs; a sample is then as many runs as take 5 ms or more.
2. A block is one sample of every engine in random order, so that a slow minute of the machine hits all alike.
3. A sample is retained if nothing else took the core: no involuntary context switch, and, on one thread,
   wall time within 5 % of CPU time.
4. Blocks go on until every engine's 95 % interval of the median is within +-1 %, 30 samples at least,
   500 at most, or until the time is over (`unstable`).
5. Where more than half of an engine's samples are disturbed, its CPU times stand in and it is `contended`.
"""

import logging
import os
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from compressor.measurement import Measurement, median_interval

logger = logging.getLogger(__name__)

PROTOCOL = "interleaved-1"


@dataclass(frozen=True)
class Sample:
    """One timed stretch of runs.

    Attributes:
        wall_s: Wall time.
        cpu_s: CPU time of the process.
        disturbed: Whether something else took the core meanwhile.
    """

    wall_s: float
    cpu_s: float
    disturbed: bool


Timer: TypeAlias = Callable[[int], Sample]


@dataclass(frozen=True)
class Protocol:
    """Numbers of the protocol.

    Attributes:
        warm_up_s: Least warm-up time per engine.
        sample_s: Least length of a sample.
        min_samples: Retained samples before the interval is looked at.
        max_samples: Samples after which an engine is done.
        half_width: Relative half width of the interval that is narrow enough.
        max_s: Time per engine after which the rest is given up.
    """

    warm_up_s: float = 0.2
    sample_s: float = 5e-3
    min_samples: int = 30
    max_samples: int = 500
    half_width: float = 0.01
    max_s: float = 10.0


@dataclass
class _Lane:
    timer: Timer
    repeats: int = 1
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    disturbed: int = 0
    done: bool = False


def process_timer(run: Callable[[], object], threads: int) -> Timer:
    """A timer for something that runs in this process on the CPU."""

    def timer(count: int) -> Sample:
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        for _ in range(count):
            run()
        wall_s, cpu_s = (time.perf_counter_ns() - wall) * 1e-9, (time.process_time_ns() - cpu) * 1e-9
        switched = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switches
        return Sample(wall_s, cpu_s, switched or (threads == 1 and wall_s > 1.05 * cpu_s))

    return timer


def time_together(
    timers: Mapping[str, Timer], target: Mapping[str, object], seed: int = 0, protocol: Protocol | None = None
) -> dict[str, Measurement]:
    """Time engines by the protocol above.

    Args:
        timers: Name -> timer.
        target: Fingerprint that goes into the measurements.
        seed: Of the order within blocks.
        protocol: Other numbers than the default ones.

    Returns:
        Name -> measurement; all of one session.
    """
    rules = protocol or Protocol()
    lanes = {name: _warmed_up(timer, rules) for name, timer in timers.items()}
    order = random.Random(seed)
    deadline = time.monotonic() + rules.max_s * len(lanes)
    while time.monotonic() < deadline:
        waiting = list(lanes.values())
        if all(lane.done for lane in waiting):
            break
        order.shuffle(waiting)
        for lane in waiting:
            _take(lane, rules)
    session = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{seed}"
    return {name: _measurement(lane, rules, target, session) for name, lane in lanes.items()}


def _warmed_up(timer: Timer, rules: Protocol) -> _Lane:
    spent, runs, last = 0.0, 0, 0.0
    while spent < rules.warm_up_s or runs < 10:
        last = timer(1).wall_s
        spent += last
        runs += 1
        if runs >= 100_000:
            break
    return _Lane(timer, max(1, int(np.ceil(rules.sample_s / max(last, 1e-9)))))


def _take(lane: _Lane, rules: Protocol) -> None:
    sample = lane.timer(lane.repeats)
    taken = len(lane.wall_ms) + lane.disturbed
    lane.cpu_ms.append(sample.cpu_s * 1e3 / lane.repeats)
    if sample.disturbed:
        lane.disturbed += 1
    else:
        lane.wall_ms.append(sample.wall_s * 1e3 / lane.repeats)
    taken += 1
    enough = len(lane.wall_ms) >= rules.min_samples and len(lane.wall_ms) % 10 == 0
    lane.done = lane.done or taken >= rules.max_samples or (enough and _narrow(lane.wall_ms, rules))


def _narrow(times: Sequence[float], rules: Protocol) -> bool:
    low, high = median_interval(np.asarray(times))
    return (high - low) / 2 <= rules.half_width * float(np.median(times))


def _measurement(lane: _Lane, rules: Protocol, target: Mapping[str, object], session: str) -> Measurement:
    taken = len(lane.wall_ms) + lane.disturbed
    if lane.disturbed > taken / 2:
        logger.warning("timing: %d of %d samples were disturbed by other work; CPU times are reported", lane.disturbed, taken)
        return Measurement(tuple(lane.cpu_ms), lane.disturbed, "contended", target, session)
    status = "ok" if len(lane.wall_ms) >= rules.min_samples and _narrow(lane.wall_ms, rules) else "unstable"
    return Measurement(tuple(lane.wall_ms), lane.disturbed, status, target, session)
