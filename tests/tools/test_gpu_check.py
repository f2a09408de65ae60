"""The plan for the minutes that a GPU is at hand: it fits, its steps run, and whatever happens, the rows so far are kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.fake_cuda import environment

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
OTHER = ROOT / ".venv-gpu" / "bin" / "python"  # the Python, torch and onnx of a GPU machine: `make .venv-gpu/ready`


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_page
    import gpu_plan

    return gpu_plan, gpu_page


def check(out, *arguments, python=sys.executable, variables=None, **settings):
    command = ["bash", str(TOOLS / "gpu_check.sh"), "--out", str(out), *arguments]
    inherited = {**os.environ, "PYTHON": str(python), **(variables or {})}
    return subprocess.Popen(
        command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **settings
    )


def test_the_plan_fits_the_lease_and_every_call_is_complete_in_itself(tools):
    gpu_plan, _ = tools
    text, fits = gpu_plan.plan()
    assert fits, text
    assert gpu_plan.CALLS[0].seconds <= 240
    assert [call.carries for call in gpu_plan.CALLS[1:]] == [(f".gpu-part{k}",) for k in range(gpu_plan.PARTS)]
    assert all(call.steps and len(call.command(k)) <= 2000 for k, call in enumerate(gpu_plan.CALLS, 1))
    assert all(sum(step.seconds for step in call.steps) <= 90 for call in gpu_plan.CALLS[1:-1])


def test_a_folder_that_is_too_large_for_a_call_is_said(tools, tmp_path, monkeypatch):
    gpu_plan, _ = tools
    (tmp_path / ".gpu-part0").mkdir()
    with (tmp_path / ".gpu-part0" / "part.00").open("wb") as file:
        file.truncate(65 << 20)
    monkeypatch.setattr(gpu_plan, "repository_mb", lambda root: 2.0)
    text, fits = gpu_plan.plan(tmp_path)
    assert not fits
    assert "67.0 of 64 MiB" in text
    assert "not prepared" in text


def test_every_planned_step_exists(tools, monkeypatch):
    gpu_plan, _ = tools
    monkeypatch.setenv("GPU_CHECK_NETWORKS", "")
    import gpu_check

    assert {step.name for call in gpu_plan.CALLS for step in call.steps} <= set(gpu_check.STEPS)


def test_without_a_gpu_it_says_so_and_an_unknown_step_is_refused(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plain, wrong = check(tmp_path), check(tmp_path, "--only", "latencies", "--dry")
    assert "no GPU is visible to torch" in plain.communicate(timeout=120)[0]
    assert plain.returncode == 0
    assert "no steps latencies; there are latency, " in wrong.communicate(timeout=120)[0]
    assert wrong.returncode == 1


def test_a_machine_that_is_taken_away_leaves_the_rows_so_far(tmp_path):
    process = check(tmp_path, "--dry", "--only", "search,latency")
    path, deadline = tmp_path / "gpu-dry.json", time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if path.exists() and "latency" in (steps := json.loads(path.read_text())["steps"]):  # whole at any moment
                break
        else:
            pytest.fail("the second step never began")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert steps["search"]["status"] == "ok"
    assert len(steps["search"]["rows"]) == 1
    assert steps["latency"] == {"status": "cut off", "reason": "the machine went away", "rows": []}


def test_a_step_that_takes_too_long_is_stopped_and_named(tmp_path):
    process = check(tmp_path, "--dry", "--only", "latency:0.3,search:0.2,compensation:0.2")
    output, _ = process.communicate(timeout=300)
    steps = json.loads((tmp_path / "gpu-dry.json").read_text())["steps"]
    assert process.returncode == 0, output
    assert {found["status"] for found in steps.values()} == {"stopped"}
    assert steps["search"]["reason"] == "stopped after 0 s; rows so far are kept"


def test_the_page_is_what_the_committed_rows_say(tools):
    _, gpu_page = tools
    everything = [json.loads(file.read_text()) for file in sorted(gpu_page.RESULTS.glob("gpu-*.json"))]
    assert everything
    assert gpu_page.PAGE.read_text() == gpu_page.page(everything)
    assert "No GPU has run it yet." in gpu_page.page([])


def test_later_rows_replace_earlier_ones_and_a_step_without_rows_replaces_none(tools, tmp_path):
    _, gpu_page = tools
    about = {"environment": {"device": "one"}, "dry": False}
    old = [{"network": "one", "batch": 8, "median_ms": 3}, {"network": "one", "batch": 1, "median_ms": 1}]
    new = {"network": "one", "batch": 8, "median_ms": 2}
    first = {**about, "steps": {"a": {"status": "ok", "rows": [{"x": 1}, *old]}, "b": {"status": "ok", "rows": [{"x": 1}]}}}
    second = {**about, "steps": {"a": {"status": "ok", "rows": [{"x": 2}, new]}, "b": {"status": "failed", "rows": []}}}
    for name, found in (("1", first), ("2", second), ("3", {**first, "environment": {"device": "two"}})):
        (tmp_path / name).write_text(json.dumps(found))
    merged = gpu_page.merged([tmp_path / "1", tmp_path / "2"])
    assert merged["steps"] == {
        "a": {"status": "ok", "rows": [old[1], {"x": 2}, new]},
        "b": {"status": "ok", "rows": [{"x": 1}]},
    }
    with pytest.raises(SystemExit, match="is of two, not one"):
        gpu_page.merged([tmp_path / "1", tmp_path / "3"])


def test_expectations_can_fail(tools):
    _, gpu_page = tools
    assert gpu_page.verdict(0.53, None, 0.52) == "**did not hold**"
    assert gpu_page.verdict(0.52, None, 0.52) == gpu_page.verdict(1.9, 1.8, None) == "held"
    assert gpu_page.verdict(None, 1, 2) == "not measured"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_plan_runs_dry_on_the_other_machines_python(tmp_path):
    if not OTHER.exists():
        pytest.skip("no .venv-gpu: Python 3.12 is not there (make .venv-gpu/ready PYTHON312=…)")
    data = ("--data", ".gpu-data") if (ROOT / ".gpu-data").is_dir() else ()
    variables = environment(tmp_path, OTHER)  # TensorRT's step too, over the CUDA for tests
    process = check(tmp_path, "--dry", "--seconds", "2700", *data, python=OTHER, variables=variables, cwd=ROOT)
    output, _ = process.communicate(timeout=2900)
    found = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert process.returncode == 0, output[-3000:]
    assert found["environment"]["torch"].startswith("2.11")
    reasons = {name: step.get("reason", "") for name, step in found["steps"].items() if step["status"] != "ok"}
    allowed = {"fine-tune": "no --data FOLDER"}  # what cannot be there, and why
    assert all(reasons[name].startswith(allowed.get(name, "-")) for name in reasons), reasons
