"""The short form of `tools/torture.py --files`: some mutations of every kind of file, each answered."""

import json
import subprocess
import sys

from tests.tools.test_gpu_check import TOOLS


def test_damaged_files_of_every_kind_are_answered(tmp_path):
    command = [
        sys.executable,
        str(TOOLS / "torture.py"),
        "--files",
        "--count",
        "60",
        "--seed",
        "1",
        "--out",
        str(tmp_path / "rows.json"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-1000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 15
    assert all(row["changed"] + row["raw"] + row["hang"] + row["killed"] == 0 for row in rows)
    assert sum(row["clean"] for row in rows) > 20
