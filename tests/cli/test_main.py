"""The command: one clear message per wrong use, exit codes 2 and 1, no traceback; killed and gone on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from compressor.cli.main import main
from compressor.values.files import save_tensors
from tests.networks import Residual, randomize

ROOT = Path(__file__).parents[2]
NET = """
import torch
from tests.networks import Residual, randomize

def build():
    torch.manual_seed(0)
    return randomize(Residual(16, 24))

def other():
    return Residual(16, 20)

def no_module():
    return 3

def broken():
    raise RuntimeError("out of cheese")

VALUE = 7

def data():
    from tests.training.test_fine_tune import blobs
    def batches(seed, count):
        x, y = blobs(count, seed).tensors
        return list(zip(x.split(16), y.split(16)))
    return batches(0, 64), batches(1, 32)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(NET)
    torch.manual_seed(0)
    save_tensors(path / "good.safetensors", randomize(Residual(16, 24)).state_dict())
    save_tensors(path / "other.safetensors", Residual(16, 20).state_dict())
    (path / "cut.safetensors").write_bytes((path / "good.safetensors").read_bytes()[:1000])
    bad = randomize(Residual(16, 24)).state_dict()
    bad["fc.bias"][0] = float("nan")
    save_tensors(path / "nan.safetensors", bad)
    (path / "syntax.py").write_text("def build(:\n")
    (path / "text.onnx").write_text("hello")
    (path / "text.plan").write_text("hello")
    return path


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}


def command(*arguments):
    return [sys.executable, "-m", "compressor", *map(str, arguments)]


@dataclass
class Found:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process, so that torch is imported once; signals are tested in processes of their own."""

    def call(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["compressor", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        return Found(exit_.value.code or 0, said.out, said.err)

    return call


def compress(*extra, out="out", model="net.py:build"):
    budget = [] if any(str(e) in ("--macs", "--latency", "--params") for e in extra) else ["--macs", "0.5"]
    return ["compress", model, "--input", "1x3x8x8", "--data", "net.py:data", "--out", out, "--backend", "fake", *budget, *extra]


def profile(*arguments):
    return ["profile", "net.py:build", "--shape", "1x3x8x8", *arguments]


WRONG = {
    "no such file": (["inspect", "none.py:build", "--input", "1x3x8x8"], "no such file: none.py"),
    "no such module": (["inspect", "nowhere:build", "--input", "1x3x8x8"], "no such module: nowhere"),
    "no colon": (["inspect", "net.py", "--input", "1x3x8x8"], "write package.module:callable or file.py:callable"),
    "no such callable": (["inspect", "net.py:absent", "--input", "1x3x8x8"], "has no `absent`; it offers"),
    "not callable": (["inspect", "net.py:VALUE", "--input", "1x3x8x8"], "is not callable"),
    "no module": (["inspect", "net.py:no_module", "--input", "1x3x8x8"], "must return a torch.nn.Module, it returned int"),
    "callable fails": (["inspect", "net.py:broken", "--input", "1x3x8x8"], "RuntimeError: out of cheese"),
    "syntax error": (["inspect", "syntax.py:build", "--input", "1x3x8x8"], "fails on import: SyntaxError"),
    "input does not fit": (["inspect", "net.py:build", "--input", "1x4x8x8"], "does not run on inputs of shape (1, 4, 8, 8)"),
    "input is no shape": (["inspect", "net.py:build", "--input", "3by8"], "write sizes joined by x"),
    "input is missing": (["inspect", "net.py:build"], "--input"),
    "no such option": (["inspect", "net.py:build", "--frobnicate"], "--frobnicate"),
    "weights of another network": (compress("--weights", "other.safetensors"), "wrong shapes: conv1.weight is (20, 16, 3, 3)"),
    "truncated weights": (compress("--weights", "cut.safetensors"), "cut off"),
    "no weights file": (compress("--weights", "none.pt"), "no such weights file: none.pt"),
    "NaN in weights": (compress("--weights", "nan.safetensors"), "`fc.bias` holds NaN"),
    "budget of 0": (compress("--latency", "0"), "must be above 0 and at most 1"),
    "budget above 1": (compress("--macs", "1.5"), "must be above 0 and at most 1"),
    "budget without unit": (compress("--latency", "fast"), "'2 ms'"),
    "no budget": (["compress", "net.py:build", "--input", "1x3x8x8", "--data", "digits", "--out", "x"], "at least one of latency"),
    "budget that cannot be met": (compress("--macs", "10k", out="tiny"), "the smallest legal network has macs"),
    "no such data": (compress(*["--data", "mnist"]), "no such data: 'mnist'"),
    "no such method": (compress("--method", "magic"), "known methods are aacp, cap, cc, factorize, legr, magnitude"),
    "no such sampler": (compress("--method", "legr", "--sampler", "bayes"), "known are legr, cmaes"),
    "not as published": (compress("--method", "cap", "--published", "--space", "ranks"), "--space: as published, cap has no such"),
    "no such units": (compress("--method", "cc", "--published", "--units", "filters"), "known are both, channels, ranks"),
    "no such form": (compress("--method", "factorize", "--form", "qr"), "known are svd, spatial_svd, tucker2, cp"),
    "no such fitness": (compress("--method", "aacp", "--fitness", "magic"), "known are none, train"),
    "no such space": (compress("--method", "legr", "--space", "rows"), "known are channels, ranks, depth"),
    "no such steps": (compress("--method", "aacp", "--steps", "stairs"), "known are staircase, align"),
    "an option of another method": (compress("--method", "legr", "--units", "both"), "--units is an option of cc, not of legr"),
    "no such setting": (compress("--method", "cc", "--set", "gama=1"), "there is no such setting; cc has space, accept"),
    "never published": (compress("--method", "magnitude", "--published"), "nothing was published as magnitude"),
    "no such storage": (compress("--method", "legr", "--storage", "nothing://x", out="n"), "nothing://x cannot be opened"),
    "two lists": (compress("--macs", "0.5,0.4", "--latency", "0.5,0.4"), "only one bound may be"),
    "no such criterion": (compress("--method", "magnitude", "--criterion", "l3"), "known are l1"),
    "no such back end": (compress("--backend", "tpu"), "known back ends are fake, onnxruntime"),
    "folder in use": (compress(out="."), "holds no run; choose another output folder"),
    "folder that cannot be written": (compress(out="/proc/nowhere/run"), "choose another output folder"),
    "profile of no file": (["profile", "none.onnx"], "no such file: none.onnx"),
    "profile of no ONNX": (["profile", "text.onnx"], "is no ONNX model, or cut off"),
    "profile without shape": (["profile", "net.py:build"], "give its --shape"),
    "profile on nothing": (profile("--target", "tpu"), "known back ends are fake"),
    "profile at no precision": (profile("--precision", "fp7"), "no precision 'fp7'; it has fp32"),
    "profile at no batch": (profile("--batch", "1,x"), "positive numbers joined by commas"),
    "profile with no such option": (profile("--option", "a=1"), "has no option `a`"),
    "staircase of nothing": (profile("--target", "fake", "--staircase", "x"), "no free group makes the channels of 'x'"),
    "engine on ONNX Runtime": (["profile", "text.plan"], "is an engine of TensorRT; use --target tensorrt"),
    "no such format": (["export", "net.py:build", "--format", "tflite", "--out", "x"], "known formats are onnx"),
    "no repository": (["check-repository", "nowhere"], "no such model repository"),
    "export of no run": (["export", ".", "--out", "x.onnx"], "is it a run, and is it finished?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_gets_one_message_and_exit_code_2(run, folder, case):
    arguments, message = WRONG[case]
    found = run(folder, *arguments)
    said = " ".join(found.stderr.replace("│", " ").split())
    assert " ".join(message.split()) in said
    assert "Traceback" not in found.stderr
    assert found.returncode == 2


def test_version_and_help(run, folder):
    assert "compressor 0." in run(folder, "version").stdout
    text = run(folder, "--help").stdout
    for name in ("demo", "inspect", "compress", "export", "version", "profile", "doctor", "check-repository"):
        assert name in text
    assert "Example: compressor compress" in " ".join(run(folder, "compress", "--help").stdout.replace("│", " ").split())


def test_inspect_shows_a_table_or_json(run, folder):
    found = run(folder, "inspect", "net.py:build", "--input", "1x3x8x8")
    assert found.returncode == 0
    assert "conv1" in found.stdout
    assert "no: model output" in found.stdout
    data = json.loads(
        run(folder, "inspect", "net.py:build", "--input", "1x3x8x8", "--weights", "good.safetensors", "--json").stdout
    )
    assert [group["name"] for group in data["groups"]] == ["stem", "conv1", "fc"]
    assert data["macs"] == 64 * 9 * (3 * 16 + 2 * 16 * 24) + 80
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert {name: layer["state"] for name, layer in layers.items()} == {
        "stem": "tied", "conv1": "free", "conv2": "tied", "fc": "frozen",
    }  # fmt: skip
    assert layers["stem"]["tied_to"] == ["conv2"]
    assert layers["conv1"]["macs"] == 64 * 9 * 16 * 24
    assert layers["conv1"]["removable"] == pytest.approx(1 - 1 / (16 * 24))
    assert "together with conv2" in found.stdout
    assert data["removable"]["macs"] == pytest.approx(1 - (64 * 9 * (3 + 2) + 5) / data["macs"])


def test_inspect_draws_the_network_with_its_groups(run, folder):
    found = run(folder, "inspect", "net.py:build", "--input", "1x3x8x8", "--graph", "net.svg")
    assert found.returncode == 0, found.stderr
    root = ElementTree.fromstring((folder / "net.svg").read_text())
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"stem", "conv1", "conv2", "fc"} <= set(texts)
    colours = {
        title.text.split(":")[0]: group.find("{*}rect").get("fill")
        for group in root.iter("{http://www.w3.org/2000/svg}g")
        if (title := group.find("{*}title")) is not None
    }
    assert colours["stem"] == colours["conv2"] != colours["conv1"]


def test_compress_export_and_going_on(run, folder):
    found = run(folder, *compress("--weights", "good.safetensors", "--epochs", 1, out="done"))
    assert found.returncode == 0, found.stderr
    assert "budget macs" in found.stdout
    assert "(met)" in found.stdout
    again = run(folder, *compress("--weights", "good.safetensors", "--epochs", 1, out="done"))
    assert again.stdout == found.stdout
    exported = run(folder, "export", "done", "--out", "small.onnx")
    assert "ONNX Runtime = PyTorch" in exported.stdout
    assert (folder / "small.onnx").read_bytes() == (folder / "done" / "model.onnx").read_bytes()
    whole = run(folder, "export", "net.py:build", "--input", "1x3x8x8", "--out", "whole.onnx")
    assert whole.returncode == 0, whole.stderr
    other = run(folder, *compress("--epochs", 2, "--weights", "good.safetensors", out="done"))
    assert other.returncode == 2
    assert "holds another run (it differs in finetune)" in other.stderr


def test_training_without_labels_by_a_number_of_steps(run, folder):
    found = run(folder, *compress("--weights", "good.safetensors", "--mimic", 16, out="mimicked"))
    assert found.returncode == 0, found.stderr
    assert "features mimicked" in found.stdout
    assert "fine-tuned" not in found.stdout
    assert json.loads((folder / "mimicked" / "run.json").read_text())["config"]["finetune"]["steps"] == 16


def test_a_cluster_that_is_not_there_is_a_failed_job(run, folder):
    found = run(folder, *compress("--method", "legr", "--cluster", "127.0.0.1:1", out="lonely"))
    assert found.returncode == 1
    assert "no Ray cluster at 127.0.0.1:1" in found.stderr
    assert "ray start --head" in found.stderr


def test_a_family_by_one_search_and_going_on(run, folder):
    arguments = ["compress", "net.py:build", "--input", "1x3x8x8", "--data", "net.py:data", "--backend", "fake", "--method", "legr",
                 "--macs", "0.8,0.6", "--trials", 6, "--align", 4, "--epochs", 0, "--out", "family"]  # fmt: skip
    found = run(folder, *arguments)
    assert found.returncode == 0, found.stderr
    assert "front/0: at most macs" in found.stdout
    assert "front/1: at most macs" in found.stdout
    assert found.stdout.count("(met)") >= 3
    assert "6 candidates, proposed by legr" in found.stderr
    assert (folder / "family" / "study.db").exists()
    assert (folder / "family" / "front" / "1" / "model.onnx").exists()
    again = run(folder, *arguments)
    assert again.returncode == 0
    assert "candidates" not in again.stderr, "nothing is searched twice"


def test_profile_prints_a_table_and_leaves_a_page(run, folder):
    found = run(
        folder, *profile("--target", "fake", "--precision", "fp32,fp16", "--batch", "1,2", "--layers"),
        "--staircase", "all", "--out", "profiled",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "worth having are" in found.stdout
    assert {"profile.html", "profile.json", "raw_samples.npz"} <= {p.name for p in (folder / "profiled").iterdir()}
    assert len(json.loads((folder / "profiled" / "profile.json").read_text())["records"]) == 4
    as_json = run(folder, "profile", "net.py:build", "--shape", "1x3x8x8", "--target", "fake", "--json")
    assert json.loads(as_json.stdout)["records"][0]["result"]["status"] == "ok"


def test_profile_of_what_fails_exits_with_1_and_says_why(run, folder):
    found = run(folder, "profile", "net.py:build", "--shape", "1x3x8x8", "--target", "torch", "--option", "device=cuda")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert found.returncode == 1
    assert "this PyTorch sees no GPU" in found.stdout
    assert "Traceback" not in found.stderr


def test_doctor_lists_every_back_end(run, folder):
    found = run(folder, "doctor")
    assert found.returncode == 0
    for name in ("onnxruntime", "onnxruntime-cuda", "torch", "tensorrt", "tensorrt-rtx", "fake"):
        assert name in found.stdout
    health = json.loads(run(folder, "doctor", "--json").stdout)
    assert health["onnxruntime"]["works"] is True


def test_export_to_a_repository_and_check_it(run, folder):
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    found = run(
        folder, "export", "net.py:build", "--input", "1x3x8x8", "--format", "triton", "--out", "repository", "--name", "my/net ü",
        "--precision", "int8", "--data", "net.py:data",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "accuracy" in found.stdout
    assert "perf_analyzer -m my_net" in found.stdout
    checked = run(folder, "check-repository", "repository")
    assert checked.returncode == 0
    assert "servable" in checked.stdout
    (model,) = (folder / "repository").iterdir()
    (model / "config.pbtxt").write_text("nonsense: 1\n")
    broken = run(folder, "check-repository", "repository")
    assert broken.returncode == 1
    assert "no field named" in broken.stdout


def test_ctrl_c_keeps_the_state_and_says_how_to_go_on(run, folder):
    process = start(folder, "interrupted", signal.SIGINT, "fine-tune")
    said = process[1]
    assert process[0] == 1
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert run(folder, *compress("--epochs", 40, out="interrupted")).returncode == 0


def test_killed_at_any_moment_ends_with_the_same_plan(run, folder):
    for k, moment in enumerate(("trace", "accuracy: original", "remove channels", "fine-tune")):
        code, _ = start(folder, f"killed-{k}", signal.SIGKILL, moment)
        assert code == -signal.SIGKILL
        assert run(folder, *compress("--epochs", 40, out=f"killed-{k}")).returncode == 0
    plans = {(folder / f"killed-{k}" / "plan.json").read_text() for k in range(4)}
    assert len(plans) == 1


def start(folder, out, number, moment):
    """Start a compression, send a signal when it says that it has come to a step; exit code and what it said."""
    said = []
    arguments = command(*compress("--epochs", 40, out=out))
    with subprocess.Popen(arguments, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            said.append(line)
            if moment in line:
                time.sleep(0.05)
                process.send_signal(number)
                break
        said.append(process.stderr.read())
        return process.wait(timeout=60), "".join(said)
