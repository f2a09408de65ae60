"""The timing protocol, on synthetic clocks."""

import numpy as np
import pytest

from compressor.runtime.timing import Protocol, Sample, process_timer, time_together

TARGET = {"backend": "synthetic"}


def clock(mean_s, noise=0.02, seed=0, disturbed=0.0, slowdown=1.0, order=None, name=""):
    """A timer with normal noise, a share of disturbed samples that are slower, and a record of the order."""
    random = np.random.default_rng(seed)

    def timer(count):
        if order is not None:
            order.append(name)
        hit = bool(random.random() < disturbed)
        cpu = count * mean_s * float(random.normal(1, noise))
        return Sample(cpu * (slowdown if hit else 1.0), cpu, hit)

    return timer


def test_medians_come_back_and_the_status_is_ok():
    found = time_together({"a": clock(2e-3), "b": clock(1e-3, seed=1)}, TARGET)
    assert found["a"].median_ms == pytest.approx(2.0, rel=0.01)  # noise of 2 % over 30 samples or more
    assert found["a"].ratio_to(found["b"]) == pytest.approx(2.0, rel=0.02)
    assert found["a"].status == found["b"].status == "ok"
    assert len(found["a"].times_ms) >= 30
    assert found["a"].session == found["b"].session


def test_disturbed_samples_are_dropped_and_counted():
    found = time_together({"a": clock(2e-3, disturbed=0.3, slowdown=3.0)}, TARGET)["a"]
    assert found.median_ms == pytest.approx(2.0, rel=0.02)
    assert found.discarded > 5
    assert max(found.times_ms) < 2.5


def test_a_contended_machine_is_said_and_cpu_times_stand_in():
    found = time_together({"a": clock(2e-3, disturbed=0.8, slowdown=3.0)}, TARGET)["a"]
    assert found.status == "contended"
    assert found.median_ms == pytest.approx(2.0, rel=0.02)


def test_noise_that_stays_wide_is_unstable():
    found = time_together({"a": clock(2e-3, noise=0.5)}, TARGET, protocol=Protocol(max_samples=60))["a"]
    assert found.status == "unstable"


def test_engines_alternate_in_random_order():
    order = []
    time_together({n: clock(1e-3, order=order, name=n) for n in "ab"}, TARGET)
    blocks = ["".join(order[k : k + 2]) for k in range(len(order) - 60, len(order), 2)]
    assert set(blocks) == {"ab", "ba"}


def test_equal_engines_are_rarely_told_apart_and_a_difference_is_found():
    false_wins = found_wins = 0
    for seed in range(40):
        timers = {"a": clock(1e-3, seed=3 * seed), "b": clock(1e-3, seed=3 * seed + 1), "c": clock(0.97e-3, seed=3 * seed + 2)}
        found = time_together(timers, TARGET, protocol=Protocol(half_width=0.005, warm_up_s=0.02))
        a, b, c = (found[name].interval_ms for name in "abc")
        false_wins += a[1] < b[0] or b[1] < a[0]
        found_wins += c[1] < a[0]
    assert false_wins <= 4  # of 40; intervals that do not touch are rarer than 5 %
    assert found_wins >= 36


def test_a_process_timer_sees_real_work():
    def work():
        return sum(range(20_000))

    timer = process_timer(work, threads=1)
    once, many = (np.median([timer(n).cpu_s for _ in range(20)]) for n in (1, 20))
    assert 5 < many / once < 80  # 20 runs; loose, as a CPU clock ticks coarsely on some machines
