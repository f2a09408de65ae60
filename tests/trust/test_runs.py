"""A run's folder: one process at a time, nothing missing at the end, nothing changed without a word."""

import fcntl
import json
import multiprocessing
import os
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import DataError
from compressor.runs.folder import Run
from compressor.values.files import cache_folder, read_json
from tests.pipeline.test_compress import MODEL, run

MEMBER_FILES = ("plan.json", "weights.safetensors", "network.safetensors", "model.onnx", "measurement.json")


@pytest.fixture
def finished(tmp_path):
    result = run(tmp_path / "run")
    return tmp_path / "run", {name: tensor.clone() for name, tensor in result.graph.state_dict().items()}


def hold(path, config, ready, seconds):
    with Run(path, config):
        ready.set()
        time.sleep(seconds)


def test_a_second_process_with_another_budget_is_refused_and_changes_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", {"budget": 1}, ready, 30))
    process.start()
    assert ready.wait(30)
    before = (tmp_path / "run" / "run.json").read_bytes()
    for config in ({"budget": 1}, {"budget": 2}):
        with pytest.raises(DataError, match="another process is at work"), Run(tmp_path / "run", config):
            pass
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    process.kill()
    process.join()
    with Run(tmp_path / "run", {"budget": 1}):
        pass


def test_the_lock_is_on_a_file_that_is_never_replaced(tmp_path):
    with Run(tmp_path / "run", {"budget": 1}) as held:
        inode = (tmp_path / "run" / "run.lock").stat().st_ino
        held.finish("a step", {"x": 1})
        with (tmp_path / "run" / "run.lock").open("rb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with Run(tmp_path / "run", {"budget": 1}):
        assert (tmp_path / "run" / "run.lock").stat().st_ino == inode


@pytest.mark.parametrize("name", MEMBER_FILES)
def test_what_is_deleted_of_a_finished_run_is_there_again(finished, name):
    folder, state = finished
    (folder / "front" / "0" / name).unlink()
    result = run(folder)
    for file in MEMBER_FILES:
        assert (folder / file).is_file()
    for key, tensor in result.graph.state_dict().items():
        torch.testing.assert_close(tensor, state[key])


@pytest.mark.parametrize("name", MEMBER_FILES[:4])
def test_what_is_damaged_of_a_finished_run_is_said(finished, name):
    folder, _ = finished
    file = folder / "front" / "0" / name
    file.write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} was changed since it was written, or is damaged; remove it"):
        run(folder)


@pytest.mark.parametrize("change", ["zero", "flip", "nan", "infinity"])
@pytest.mark.parametrize("name", ["weights.safetensors", "network.safetensors"])
def test_weights_that_were_changed_are_refused(finished, name, change):
    folder, _ = finished
    file = folder / "front" / "0" / name
    if change == "flip":
        data = bytearray(file.read_bytes())
        data[-1000] ^= 16
        file.write_bytes(bytes(data))
    else:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith("weight"))
        tensors[key].fill_({"zero": 0.0, "nan": float("nan"), "infinity": float("inf")}[change])
        save_file(tensors, file, metadata)
    model = None if name.startswith("network") else MODEL
    with pytest.raises(DataError, match=f"{name} was changed"):
        compressor.load(folder, model)
    with pytest.raises(DataError, match=f"{name} was changed"):
        run(folder)
    (folder / "files.json").unlink()  # as in a folder of before digests were recorded: what is no number is refused all the same
    if change in ("nan", "infinity"):
        with pytest.raises(DataError, match="holds NaN or infinity"):
            compressor.load(folder, model)


@pytest.mark.parametrize("step", ["accuracy: original", "measured"])
def test_a_changed_number_in_the_progress_is_said(finished, step):
    folder, _ = finished
    found = json.loads((folder / "progress.json").read_text())
    key = next(iter(found[step]))
    found[step][key] = 1.0
    (folder / "progress.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"progress.json was changed since it was written"):
        run(folder)


def test_names_in_the_progress_lead_nowhere(tmp_path):
    (tmp_path / "secret.json").write_text('{"percent": 100.0}')
    with Run(tmp_path / "run", {}) as own:
        own.finish("a", {})
        (tmp_path / "run" / "progress.json").write_text(json.dumps({"a": {"in file": "../secret.json"}}))
        with pytest.raises(DataError, match="no file of a run"):
            own.done("a")


def test_pipes_loops_and_folders_are_answered(tmp_path):
    run_json = tmp_path / "run" / "run.json"
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path.name, path)):
        run_json.parent.mkdir(exist_ok=True)
        make(run_json)
        with pytest.raises(DataError, match=r"run.json cannot be read"), Run(tmp_path / "run", {}):
            pass
        run_json.rmdir() if run_json.is_dir() and not run_json.is_symlink() else run_json.unlink()


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a": ' + "9" * 5000 + "}", '{"a": NaN}', '{"a": 1e999}', "[]", '{"a"', "", '{"seal": "x", "a": "\\ud800"}'],
)
def test_json_of_any_form_is_answered(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError):
        read_json(tmp_path / "x.json")


def test_equal_runs_write_equal_networks(tmp_path):
    one, other = (run(tmp_path / name, budget=compressor.Budget(macs=0.6)) for name in ("a", "b"))
    assert one.plan == other.plan
    for name in ("network.safetensors", "weights.safetensors", "plan.json", "model.onnx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_kill_between_a_file_and_its_digest_leaves_a_run_that_goes_on(tmp_path):
    """Also where the file had been written before: as the weights, where the fine-tuned ones are not kept."""
    file = tmp_path / "run" / "weights"
    with Run(tmp_path / "run", {}) as own:
        for text in ("first", "second"):
            with own.writing(file):
                file.write_text(text)
        with suppress(KeyboardInterrupt), own.writing(file):
            file.write_text("third")
            raise KeyboardInterrupt
    with Run(tmp_path / "run", {}) as own:
        assert own.intact(file)
        file.write_text("changed")
        with pytest.raises(DataError, match="was changed"):
            own.intact(file)


def test_facts_that_are_missing_are_found_anew(tmp_path):
    with Run(tmp_path / "run", {}) as own:
        own.finish("long", {"x": "y" * 30_000})
        (facts,) = (tmp_path / "run" / "facts").iterdir()
        facts.unlink()
        assert own.done("long") is None


@pytest.mark.parametrize("change", [b"", b"{}"])
def test_a_damaged_configuration_is_answered_with_what_helps(finished, change):
    folder, _ = finished
    (folder / "run.json").write_bytes(change)
    with pytest.raises(DataError, match="choose another output folder"):
        run(folder)


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    from pathlib import Path

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("COMPRESSOR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder().name.startswith("compressor-")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where nobody may")
def test_a_folder_that_cannot_be_written_is_said(finished):
    folder, _ = finished
    folder.chmod(0o500)
    with pytest.raises(DataError, match="cannot write"):
        run(folder)


def test_a_loaded_network_is_a_traced_graph_again(finished):
    folder, _ = finished
    graph = compressor.load(folder)
    again = compressor.analyze(graph)
    small = compressor.apply(again.plan(0.5), graph)
    with torch.no_grad():
        assert small(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
