"""Files: whole or not at all; weights from safetensors or plain tensors, strictly."""

import argparse
import json
import os
from pathlib import Path

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


def under(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def checkpoints():
    """Name -> what a trainer saves, and what is said of it; `good` weights are to be found among `bad` ones."""
    good, bad = (Residual().state_dict() for _ in range(2))
    teacher = under("teacher.", {"a": torch.ones(3), "b": torch.zeros(2)})
    arguments = argparse.Namespace(lr=0.1, out=Path("runs"))
    return good, {
        "plain": (good, ""),
        "Lightning": (
            {"epoch": 3, "state_dict": {**under("model.", good), **teacher}, "hyper_parameters": {"net": arguments}, "loops": {}},
            "of `state_dict`, without the prefix `model.`, 2 other tensors left",
        ),
        "DataParallel": ({"net": under("module.", good)}, "of `net`, without the prefix `module.`"),
        "compiled": (under("_orig_mod.", good), "without the prefix `_orig_mod.`"),
        "compiled inside": (
            under("model.", {name.replace("conv1.", "conv1._orig_mod."): tensor for name, tensor in good.items()}),
            "without the prefix `model.`, without what a wrapper put into the names",
        ),
        "both": ({"model": under("module._orig_mod.", good)}, "of `model`, without the prefix `module._orig_mod.`"),
        "timm": (
            {"state_dict": bad, "state_dict_ema": good, "args": arguments, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
            "of `state_dict_ema`, the moving average",
        ),
        "ema beside": (
            {"params": {**under("online_model.", bad), **under("ema_model.", good), "step": torch.tensor(5)}},
            f"of `params`, the moving average, without the prefix `ema_model.`, {len(good) + 1} other tensors left",
        ),
        "averaged": (
            {**under("module.", good), "n_averaged": torch.tensor(3)}, "without the prefix `module.`, 1 other tensor left"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", checkpoints()[1])
def test_weights_are_found_in_checkpoints_as_trainers_leave_them(tmp_path, name):
    good, saved = checkpoints()
    loaded, said = saved[name]
    torch.save(loaded, tmp_path / "a.ckpt")  # noqa: TID251 - a user's file
    model = Residual()
    assert load_weights(model, tmp_path / "a.ckpt") == said
    assert digest_of_tensors(model.state_dict()) == digest_of_tensors(good)


def test_a_checkpoint_without_the_model_names_what_is_missing_of_the_nearest(tmp_path):
    tensors = under("model.", Residual().state_dict())
    del tensors["model.fc.bias"]
    torch.save({"state_dict": tensors, "other": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")  # noqa: TID251 - a user's file
    with pytest.raises(DataError, match=r"does not fit Residual; missing keys: fc\.bias$"):
        load_weights(Residual(), tmp_path / "a.ckpt")
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "b.ckpt")  # noqa: TID251 - a user's file
    with pytest.raises(DataError, match="holds no state_dict"):
        load_weights(Residual(), tmp_path / "b.ckpt")


def test_names_of_a_file_of_tensors_are_as_they_are(tmp_path):
    tensors = {"module.weight": torch.ones(2), "model.module.bias": torch.zeros(2)}  # a model may have such a child
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert load_tensors(tmp_path / "a.safetensors").keys() == tensors.keys()
    model = torch.nn.ModuleDict({"module": Residual()})
    save_tensors(tmp_path / "b.safetensors", model.state_dict())
    other = torch.nn.ModuleDict({"module": Residual()})
    assert load_weights(other, tmp_path / "b.safetensors") == ""
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
