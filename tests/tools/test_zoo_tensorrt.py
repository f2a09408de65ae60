"""The zoo's short list parses and builds with TensorRT-RTX, as it is and pruned, at every precision; most in `make test-all`."""

import pytest

from tools import zoo_tensorrt

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


OFTEN = {"resnet18", "test_convnext2"}
ENTRIES = [
    pytest.param(entry, id=entry[3], marks=() if entry[3] in OFTEN else pytest.mark.slow) for entry in zoo_tensorrt.short_list()
]


def test_those_of_every_day_are_on_the_list():
    assert {entry[3] for entry in zoo_tensorrt.short_list()} >= OFTEN


@pytest.mark.parametrize("entry", ENTRIES)
def test_it_parses_and_builds(entry):
    rows = zoo_tensorrt.compile_all(entry)
    assert len(rows) == 6
    for row in rows:
        assert row["engine_bytes"] > 1000
        wanted = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[row["precision"]]
        assert row["network_types"][wanted] > 0
