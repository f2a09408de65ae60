"""What is typed for a task: `--task`, `--metric`, `--part`, inputs with names and types, an ONNX file."""

import json
import sys

import pytest
import torch
import typer

import compressor
from compressor.cli.main import main
from compressor.cli.options import inputs_of
from compressor.cli.task_options import task_of
from compressor.errors import DataError

NET = """
import torch
from torch import nn
from compressor import Task
from tests.tasks.test_compress_tasks import Restores, TwoEyes, Whole, pictures

def build():
    torch.manual_seed(0)
    return Restores()

def whole():
    torch.manual_seed(0)
    return Whole()

def data():
    clean = pictures(64)
    pairs = list(zip((clean + 0.1).split(16), clean.split(16)))
    return pairs[1:], pairs[:1]

def labelled():
    x = pictures(64)
    pairs = list(zip(x.split(16), (x.mean((1, 2, 3)) > 0.5).long().split(16)))
    return pairs[1:], pairs[:1]

def own():
    return Task(lambda outputs, batch: (outputs - batch[1]).abs().mean(), error)

def error(model, batches):
    return sum(float((model(x) - y).abs().mean()) for x, y in batches)

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "task_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def terminal(monkeypatch, capsys):
    return monkeypatch, capsys


def run(terminal, *arguments):
    monkey, capsys = terminal
    monkey.setattr(sys, "argv", ["compressor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    found = capsys.readouterr()
    return ended.value.code or 0, found.out + found.err


COMMON = ("--macs", "0.6", "--backend", "fake", "--align", "2", "--lr", "0.001", "--method", "magnitude")


def compress(*more):
    return ("compress", "task_net.py:build", "--input", "1x1x16x16", "--data", "task_net.py:data", "--epochs", "1", *COMMON, *more)


@pytest.mark.parametrize(("options", "heading"), [
    (("--task", "image-to-image"), "PSNR dB"), (("--task", "image-to-image:data_range=2"), "PSNR dB"),
    (("--task", "task_net.py:own"), "error"), (("--task", "regression", "--metric", "task_net.py:error"), "error"),
])  # fmt: skip
def test_a_task_is_named(folder, terminal, options, heading):
    code, said = run(terminal, *compress("--out", folder / "run", *options))
    assert code == 0, said
    assert heading in said
    assert json.loads((folder / "run" / "result.json").read_text())["metric"]["name"] == heading.split(" ")[0]


def test_a_part_is_named(folder, terminal):
    own = ("task_net.py:whole", "--part", "backbone", "--input", "1x1x16x16", "--data", "task_net.py:labelled", "--epochs", "0")
    code, said = run(terminal, "compress", *own, *COMMON, "--out", folder / "run")
    assert code == 0, said
    assert "accuracy" in said


def test_an_onnx_file_is_a_model_like_any_other(folder, terminal):
    torch.manual_seed(0)
    from tests.tasks.test_compress_tasks import Restores

    net = Restores().eval()
    compressor.export(compressor.trace(net, (torch.zeros(1, 1, 16, 16),)), folder / "model.onnx")
    again = compressor.from_onnx(folder / "model.onnx")
    x = torch.rand(2, 1, 16, 16)
    assert torch.allclose(again(x), net(x), atol=1e-5)
    code, said = run(terminal, "inspect", "model.onnx", "--input", "1x1x16x16")
    assert code == 0, said
    code, said = run(terminal, "compress", "model.onnx", *compress("--task", "image-to-image", "--out", folder / "run")[2:])
    assert code == 0, said


WRONG = {
    "no such task": (("--task", "segment"), "ready tasks are"),
    "no number of classes": (("--task", "segmentation"), "write segmentation:classes=21"),
    "no such setting": (("--task", "segmentation:colours=3"), "its settings are classes, ignore_index"),
    "a setting that is no number": (("--task", "segmentation:classes=many"), "must be a number"),
    "no task": (("--task", "task_net.py:number"), "must return a compressor.Task"),
    "no metric": (("--task", "regression", "--metric", "task_net.py:number"), "a metric is a compressor.Metric"),
    "no task at all": ((), "say what it is for by task="),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(folder, terminal, case):
    options, message = WRONG[case]
    code, said = run(terminal, *compress("--out", folder / "run", *options))
    assert code in (1, 2)
    assert message in " ".join(said.split()).replace("│ ", "")
    assert "Traceback" not in said


def test_inputs_have_names_and_types():
    from tests.tasks.test_compress_tasks import TwoEyes

    found = inputs_of(["depth=1x1x8x8", "rgb=2x3x8x8:uint8"], TwoEyes())
    assert [(tuple(x.shape), x.dtype) for x in found] == [((2, 3, 8, 8), torch.uint8), ((1, 1, 8, 8), torch.float32)]
    assert [x.dtype for x in inputs_of(["1x4:int64", "2x2"])] == [torch.int64, torch.float32]
    for shapes, said in ((["height=1x1x8x8"], "no input 'height'; its own are rgb, depth"), (["1x3:integer"], "is no type")):
        with pytest.raises(typer.BadParameter, match=said):
            inputs_of(shapes, TwoEyes())


def test_nothing_said_is_no_task():
    assert task_of(None, None) is None
    with pytest.raises(DataError, match="no such"):
        task_of("no_such_module:task", None)
