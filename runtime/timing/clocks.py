"""Clocks, power and heat of a device, read from a side thread, never inside a timed stretch.

A GPU that gets hot or reaches its power limit lowers its clock, and a latency taken then is another latency. Clocks
cannot be locked on most machines, so they are read beside the samples: every sample gets the reading nearest to it.
"""

import bisect
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Reading:
    """One look at the device.

    Attributes:
        at: `time.monotonic()` of it.
        mhz: Clock of the cores (SM clock), or None where it cannot be read.
        slowed: Whether the device says that it is slowed down for heat or by a hardware signal.
        capped: Whether it says that it has reached its power limit; normal at large batches.
        power_w: Power drawn, or None.
        temperature_c: Temperature, or None.
    """

    at: float
    mhz: float | None
    slowed: bool = False
    capped: bool = False
    power_w: float | None = None
    temperature_c: float | None = None


Source = Callable[[], Reading]


class ClockSampler:
    """Reads a source from a thread while the block runs; without a source it stays empty.

    Args:
        source: What to read, such as `nvml_source(0)`; None for nothing.
        hertz: Readings per second.
    """

    def __init__(self, source: Source | None, hertz: float = 50.0) -> None:
        self._source = source
        self._pause = 1.0 / hertz
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.readings: list[Reading] = []

    def near(self, at: float) -> Reading | None:
        """The reading nearest to a moment, where there is one within half a second."""
        readings = self.readings[:]
        k = bisect.bisect_left([r.at for r in readings[-2000:]], at) + max(len(readings) - 2000, 0)
        around = readings[max(k - 1, 0) : k + 1]
        best = min(around, key=lambda r: abs(r.at - at), default=None)
        return best if best is not None and abs(best.at - at) <= 0.5 else None

    def __enter__(self) -> Self:
        """Start reading."""
        if self._source is not None:
            self._thread = threading.Thread(target=self._read, name="clocks", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _read(self) -> None:
        assert self._source is not None
        while not self._stop.is_set():
            self.readings.append(self._source())
            self._stop.wait(self._pause)


def summary_of(readings: Sequence[Reading]) -> dict[str, object]:
    """Clocks, power and temperature over a session, as plain data; empty without readings."""
    if not readings:
        return {}
    found: dict[str, object] = {"readings": len(readings)}
    clocks = [r.mhz for r in readings if r.mhz is not None]
    if clocks:
        found["mhz"] = {"min": min(clocks), "median": float(np.median(clocks)), "max": max(clocks)}
    for name in ("power_w", "temperature_c"):
        values = [value for r in readings if (value := getattr(r, name)) is not None]
        if values:
            found[name] = float(np.median(values))
    found["power_capped"] = sum(r.capped for r in readings) > 0.05 * len(readings)
    found["slowed"] = sum(r.slowed for r in readings)
    return found


def nvml_source(index: int = 0) -> Source | None:
    """SM clock, power, temperature and slow-down reasons of a GPU; None without NVML (`pip install nvidia-ml-py`)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:  # no package, no driver, no GPU, no permission: all the same here
        return None

    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")  # the newer one first
    why = next((getattr(pynvml, name) for name in names if hasattr(pynvml, name)), None)

    def read() -> Reading:
        reasons = (_or_none(why, handle) if why is not None else None) or 0
        power = _or_none(pynvml.nvmlDeviceGetPowerUsage, handle)
        return Reading(
            time.monotonic(),
            _or_none(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            slowed=bool(reasons & _SLOWED),
            capped=bool(reasons & _CAPPED),
            power_w=None if power is None else power / 1000,
            temperature_c=_or_none(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        )

    return read


# Bits of nvmlClocksThrottleReasons (nvml.h): HW slowdown 0x8, SW thermal 0x20, HW thermal 0x40, HW power brake 0x80;
# SW power cap 0x4.
_SLOWED = 0x8 | 0x20 | 0x40 | 0x80
_CAPPED = 0x4


def _or_none(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:  # not every GPU has every sensor
        return None


def cpu_source() -> Source | None:
    """Clock of the processor; None where the system does not tell (virtual machines)."""
    files = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if not files:
        return None

    def read() -> Reading:
        return Reading(time.monotonic(), max(float(file.read_text()) for file in files) / 1000)

    return read
