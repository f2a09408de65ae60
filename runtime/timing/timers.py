"""Timers: functions that run an engine `n` times and say how long that took, and whether anything interfered."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Sample:
    """One timed stretch of runs.

    Attributes:
        wall_s: Time of the device: wall time on a CPU, between two events on a GPU.
        cpu_s: CPU time of the process, or `wall_s` where that says nothing.
        disturbed: Whether something else took the core meanwhile.
        mhz: Clock of the device during the stretch, where the timer knows it.
        slowed: Whether the device said that it was slowed down.
        host_s: On a GPU: wall time from the first call to the last result.
        enqueue_s: On a GPU: wall time of handing over the work.
    """

    wall_s: float
    cpu_s: float
    disturbed: bool
    mhz: float | None = None
    slowed: bool = False
    host_s: float | None = None
    enqueue_s: float | None = None


Timer: TypeAlias = Callable[[int], Sample]


def process_timer(run: Callable[[], object], threads: int) -> Timer:
    """A timer for something that runs in this process on the CPU.

    Args:
        run: One run.
        threads: CPU threads that it uses. With one, wall time beyond CPU time tells of interference; with several
            they differ by nature, and time stolen from the whole (virtual) machine is looked at instead.
    """
    who = resource.RUSAGE_THREAD if threads == 1 else resource.RUSAGE_SELF

    def timer(count: int) -> Sample:
        stolen = 0 if threads == 1 else _stolen()
        switches = resource.getrusage(who).ru_nivcsw
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        for _ in range(count):
            run()
        wall_s, cpu_s = (time.perf_counter_ns() - wall) * 1e-9, (time.process_time_ns() - cpu) * 1e-9
        switched = resource.getrusage(who).ru_nivcsw > switches
        taken = wall_s > 1.05 * cpu_s if threads == 1 else _stolen() > stolen
        return Sample(wall_s, cpu_s, switched or taken)

    return timer


def _stolen() -> int:
    """Ticks that the hypervisor took from this machine so far; 0 where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0
