"""Measurement: median, interval, JSON; never compared across targets."""

import json

import numpy as np
import pytest

from compressor import DataError, Measurement
from compressor.values.measurement import median_interval


def test_it_survives_json():
    found = Measurement((1.0, 3.0, 2.0), 4, "ok", {"backend": "fake", "batch": 1}, "s")
    again = Measurement.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again.median_ms == 2.0


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = median_interval(random.lognormal(0, 0.2, 60))
        hits += low <= 1.0 <= high
    assert hits / 400 >= 0.92  # 95 % or more, less three standard errors of 400 trials


def test_the_bootstrap_covers_less_often():
    """Why the interval is from order statistics and not from the percentile bootstrap."""
    random = np.random.default_rng(0)
    ours = bootstrap = 0
    for _ in range(600):
        sample = random.lognormal(0, 0.2, 30)
        low, high = median_interval(sample)
        ours += low <= 1.0 <= high
        medians = np.median(sample[random.integers(0, 30, (400, 30))], axis=1)
        low, high = np.percentile(medians, (2.5, 97.5))
        bootstrap += low <= 1.0 <= high
    assert bootstrap < ours
    assert ours / 600 >= 0.94


def test_ratios_across_targets_are_refused():
    one = Measurement((1.0,), 0, "ok", {"backend": "a"}, "s")
    with pytest.raises(DataError, match="different targets"):
        one.ratio_to(Measurement((1.0,), 0, "ok", {"backend": "b"}, "s"))


@pytest.mark.parametrize(
    "change", [{"times_ms": []}, {"times_ms": 3}, {"status": None}, {"times_ms": [float("nan")]}, {"target": []}]
)
def test_malformed_records_name_the_field(change):
    record = Measurement((1.0,), 0, "ok", {}, "s").to_dict() | change
    with pytest.raises(DataError, match=next(iter(change))):
        Measurement.from_dict(record)
