"""The README: its Python runs, its links and files are there."""

import re
from pathlib import Path

import pytest
import torch

from compressor.passes.labels.rules import EDITS, RULES
from tests.networks import check_effective, randomize

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, tmp_path, monkeypatch, capsys):
    from tests.networks import Residual
    from tests.training.test_fine_tune import blobs

    monkeypatch.chdir(tmp_path)
    x, y = blobs(64).tensors
    loader = list(zip(x.repeat(1, 1, 4, 4).split(16), y.split(16), strict=True))
    names = {"model": Residual(32, 32), "train_loader": loader, "validate_loader": loader, "torch": torch}
    code = BLOCKS[number]
    for long, short in (
        ("trials=120", "trials=4, engines=6"), ("[0.8, 0.65, 0.5]", "[0.9, 0.8]"), ("CaP()", "CaP(engines=6, probes=32)"),
    ):  # fmt: skip
        code = code.replace(long, short)
    exec(compile(code, f"README block {number}", "exec"), names)


def test_the_rule_from_outside_prunes_what_was_frozen():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names = {}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 12, 3), torch.nn.Conv2d(12, 4, 3)

        def forward(self, x):
            return self.b(names["rotate"](self.a(x), 5))

    try:
        exec(compile(block, "CONTRIBUTING", "exec"), names)
        check_effective(randomize(Model()), (torch.randn(2, 3, 8, 8),))
    finally:
        RULES.pop(torch.ops.mine.rotate, None)
        EDITS.pop(torch.ops.mine.rotate, None)


PAGES = ["CONTRIBUTING.md", "README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("file", PAGES)
def test_links_and_files_exist(file):
    text = (ROOT / file).read_text()
    for target, place in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        page = (ROOT / file).parent / target if target else ROOT / file
        assert page.exists(), target
        if place:
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
            titles = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert place[1:] in titles, f"{target}{place}"
    for path in re.findall(r"`((?:tools|passes|runtime|compressor|tests|docs)/[\w/.-]+\.(?:py|sh|json|md))`", text):
        assert (ROOT / path).exists(), path


def test_the_changelog_names_the_version():
    from compressor import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_page_about_tasks_runs(tmp_path, monkeypatch):
    """A segmenter is compressed; there is a task of one's own; a network is given away to be trained, and taken back."""
    torchmetrics = pytest.importorskip("torchmetrics")
    import compressor

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU()]
    unet = randomize(torch.nn.Sequential(*layers, torch.nn.Conv2d(32, 21, 1)))
    pairs = [(torch.randn(8, 3, 16, 16), torch.randint(0, 21, (8, 16, 16))) for _ in range(4)]
    fast = {
        "epochs=0)": "epochs=0), method=compressor.Magnitude(), task=task",
        "256": "16",
        "out=": "target=fake, out=",
        "latency=0.5": "macs=0.6",
    }
    names = {
        "compressor": compressor, "torch": torch, "unet": unet, "train": pairs, "validate": pairs, "F": torch.nn.functional,
        "fake": compressor.Target("fake"), "MeanAbsoluteError": torchmetrics.MeanAbsoluteError,
    }  # fmt: skip
    first, second, third = blocks
    for long, short in fast.items():
        first, third = first.replace(long, short), third.replace(long, short)
    exec(compile(first, "docs/tasks.md, 1", "exec"), names)
    exec(compile(second, "docs/tasks.md, 2", "exec"), names)
    assert names["task"].metric.name == "MeanAbsoluteError"
    names |= {"model": unet, "inputs": (torch.zeros(1, 3, 16, 16),), "images": [x for x, _ in pairs], "train": lambda graph: None}
    names |= {"budget": compressor.Budget(macs=0.6), "task": compressor.tasks.segmentation(classes=21)}
    exec(compile(third.replace("validate=validate)", "validate=validate, task=task)"), "docs/tasks.md, 3", "exec"), names)
    assert names["result"].metric.name == "mIoU"
