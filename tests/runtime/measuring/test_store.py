"""The store of measurements: keyed by what, on what and how; shared by processes; never fatal, nothing lost."""

import contextlib
import sqlite3
import subprocess
import sys

import pytest

from compressor.runtime.measuring.store import _TABLE, SCHEMA, MeasurementStore
from compressor.values.measurement import Measurement

TARGET = {"backend": "fake", "driver": "1", "options": {"mode": "a"}}


def measurement(ms=1.0, target=TARGET):
    return Measurement((ms, ms, ms), 0, "ok", target, "s", (0, 1, 2), (ms, ms, ms), {"noise_floor": 0.005})


@pytest.fixture
def store(tmp_path):
    return MeasurementStore(tmp_path / "deep" / "latency.sqlite")


def test_what_was_put_comes_back_with_what_lay_beside_it(store):
    assert store.get("net", TARGET, "p") is None
    store.put("net", measurement(), "p", {"layers": [1, 2]})
    assert store.get("net", TARGET, "p") == (measurement(), {"layers": [1, 2]})


@pytest.mark.parametrize(
    ("built", "target", "protocol"),
    [
        ("other", TARGET, "p"),
        ("net", TARGET | {"driver": "2"}, "p"),
        ("net", TARGET | {"options": {"mode": "b"}}, "p"),
        ("net", TARGET, "q"),
    ],
)
def test_another_network_driver_setting_or_protocol_is_another_key(store, built, target, protocol):
    store.put("net", measurement(), "p")
    assert store.get(built, target, protocol) is None


def test_the_latest_counts_and_earlier_ones_stay(store):
    for ms in (1.0, 2.0):
        store.put("net", measurement(ms), "p")
    assert store.get("net", TARGET, "p")[0].median_ms == 2.0
    assert len(store) == 2


@pytest.mark.parametrize("damage", ["text", "cut", "older"])
def test_a_file_that_cannot_be_used_is_set_aside_with_a_message(store, damage, caplog):
    store.put("net", measurement(), "p")
    if damage == "older":
        with sqlite3.connect(store.path) as connection:
            connection.execute("PRAGMA user_version = 77")
        connection.close()
    else:
        data = store.path.read_bytes()
        store.path.write_bytes(
            b"this is no database at all, but long enough" * 40 if damage == "text" else data[: len(data) // 2 + 7]
        )
    store.put("net", measurement(3.0), "p")
    assert store.get("net", TARGET, "p")[0].median_ms == 3.0
    aside = [p for p in store.path.parent.iterdir() if "set-aside" in p.name]
    assert aside
    assert "a new one is begun" in caplog.text


WRITER = """
import sys
from pathlib import Path
from compressor.values.measurement import Measurement
from compressor.runtime.measuring.store import _TABLE, SCHEMA, MeasurementStore
store = MeasurementStore(Path(sys.argv[1]))
for k in range(25):
    store.put(f"{sys.argv[2]}-{k}", Measurement((1.0,), 0, "ok", {}, "s"), "p")
"""


def test_many_processes_write_at_once_and_nothing_is_lost(store):
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(store.path), str(k)]) for k in range(4)]
    assert [p.wait(timeout=120) for p in processes] == [0] * 4
    assert len(store) == 100


def test_a_file_that_another_process_is_beginning_is_waited_for_not_set_aside(store):
    store.path.parent.mkdir(parents=True)
    with store._alone(), contextlib.closing(sqlite3.connect(store.path)) as connection:
        connection.execute("CREATE TABLE measurements (id INTEGER PRIMARY KEY)")
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(store.path), "x"])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        connection.execute("DROP TABLE measurements")
        connection.executescript(f"{_TABLE} PRAGMA user_version = {SCHEMA};")
    assert process.wait(timeout=60) == 0
    assert len(store) == 25
    assert not [p for p in store.path.parent.iterdir() if "set-aside" in p.name]


def test_a_writer_that_is_killed_harms_nobody(store):
    store.put("net", measurement(), "p")
    process = subprocess.Popen([sys.executable, "-c", WRITER.replace("range(25)", "range(10**6)"), str(store.path), "x"])
    while len(store) < 10 and process.poll() is None:
        pass
    process.kill()
    process.wait()
    before = len(store)
    store.put("net", measurement(2.0), "p")
    assert len(store) == before + 1
