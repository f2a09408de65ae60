"""Files: whole or not at all; weights from safetensors or plain tensors, strictly."""

import json
import os

import optuna
import pytest
import torch

from compressor import DataError
from compressor.runs.folder import Run
from compressor.search.storage import shared_once
from compressor.values.files import digest_of_tensors, load_tensors, load_weights, save_tensors, write_bytes
from tests.networks import Residual


def test_weights_travel_as_safetensors_and_as_plain_pt(tmp_path):
    model = Residual()
    save_tensors(tmp_path / "a.safetensors", model.state_dict())
    torch.save(model.state_dict(), tmp_path / "a.pt")  # noqa: TID251 - a user's file
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "b.pth")  # noqa: TID251
    for name in ("a.safetensors", "a.pt", "b.pth"):
        other = Residual()
        load_weights(other, tmp_path / name)
        assert digest_of_tensors(other.state_dict()) == digest_of_tensors(model.state_dict())


def test_counters_of_batch_norms_may_be_missing(tmp_path):
    tensors = {k: v for k, v in Residual().state_dict().items() if not k.endswith("num_batches_tracked")}
    save_tensors(tmp_path / "a.safetensors", tensors)
    load_weights(Residual(), tmp_path / "a.safetensors")


def test_weights_of_another_network_name_the_keys(tmp_path):
    tensors = Residual(inner=13).state_dict()
    tensors["extra.weight"] = tensors.pop("fc.bias")
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(
        DataError, match=r"missing keys: fc\.bias; unexpected keys: extra\.weight; wrong shapes: conv1\.weight is \(13"
    ):
        load_weights(Residual(), tmp_path / "a.safetensors")


def test_nan_is_named(tmp_path):
    tensors = Residual().state_dict()
    tensors["conv1.weight"][0] = float("nan")
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(DataError, match=r"`conv1\.weight` holds NaN"):
        load_weights(Residual(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files_are_said_to_be_cut_off(tmp_path, name, share):
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(Residual().state_dict(), path)  # noqa: TID251 - a user's file
    else:
        save_tensors(path, Residual().state_dict())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    expected = "not a safetensors file, or cut off" if name.endswith("safetensors") else "cut off, or not a file of plain tensors"
    with pytest.raises(DataError, match=f"{name}: {expected}"):
        load_tensors(path)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile",))


def test_code_in_a_pt_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Hostile()}, tmp_path / "a.pt")  # noqa: TID251 - a hostile user's file
    with pytest.raises(DataError, match="plain tensors"):
        load_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "hostile").exists()


def test_missing_files_and_things_that_are_no_state_dict_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no such weights file: .*none\.pt"):
        load_tensors(tmp_path / "none.pt")
    torch.save({"epoch": 3}, tmp_path / "a.pt")  # noqa: TID251 - a user's file
    with pytest.raises(DataError, match="no state_dict of tensors"):
        load_tensors(tmp_path / "a.pt")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_bytes(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_long_results_of_a_run_have_files_of_their_own(tmp_path):
    long, short = {"loss": [0.123456789] * 5000}, {"ms": 1.5}
    with Run(tmp_path / "run", {"seed": 0}) as run:
        assert run.once("curves", lambda: long) == long
        assert run.once("time", lambda: short) == short
    with Run(tmp_path / "run", {"seed": 0}) as again:
        assert again.once("curves", dict) == long
        assert again.done("time") == short
        assert again.done("nothing") is None
    assert (tmp_path / "run" / "progress.json").stat().st_size < 1000


def test_long_facts_in_a_storage_are_cut_and_put_together(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    value = {"text": "é" * 50_000, "loss": [0.1, -1e-30]}
    assert shared_once(url, "facts", "a", lambda: value) == value
    assert shared_once(url, "facts", "a", dict) == value
    kept = optuna.load_study(study_name="facts", storage=url).user_attrs
    assert max(len(json.dumps(part)) for part in kept.values()) < 60_000
