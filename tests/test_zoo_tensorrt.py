"""The zoo's short list parses and builds with TensorRT-RTX, as it is and pruned, at every precision."""

import pytest

from tools import zoo_tensorrt

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.mark.parametrize("entry", zoo_tensorrt.short_list(), ids=lambda entry: entry[3])
def test_it_parses_and_builds(entry):
    rows = zoo_tensorrt.compile_all(entry)
    assert len(rows) == 6
    for row in rows:
        assert row["engine_bytes"] > 1000
        wanted = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[row["precision"]]
        assert row["network_types"][wanted] > 0
