"""Every example runs, small, and ends with a network that is within its budget or says so."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

SMALL = {
    "01_classifier": {"epochs": 2},
    "02_segmentation": {"scenes_used": 192, "epochs": 2},
    "03_super_resolution": {"epochs": 2},
    "04_two_inputs": {"scenes_used": 192, "epochs": 2},
    "05_detection": {"scenes_used": 96, "epochs": 2},
    "06_hugging_face": {"scenes_used": 192, "epochs": 2},
    "07_without_labels": {"steps": 10},
    "08_own_training": {"epochs": 2},
}
NEEDS = {
    "01_classifier": ["sklearn"], "02_segmentation": ["segmentation_models_pytorch", "torchmetrics", "sklearn"],
    "03_super_resolution": ["skimage", "torchmetrics", "sklearn"], "04_two_inputs": ["torchmetrics", "sklearn"],
    "05_detection": ["ultralytics", "pycocotools", "sklearn"], "06_hugging_face": ["transformers", "sklearn"],
    "07_without_labels": ["timm", "PIL"], "08_own_training": ["sklearn"],
}  # fmt: skip
SHORT = ("04_two_inputs",)  # the others take a minute or several


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("[0-9]*.py")} == set(SMALL)


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize("name", [own if own in SHORT else pytest.param(own, marks=pytest.mark.slow) for own in SMALL])
def test_an_example_runs(name, tmp_path, monkeypatch):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = {"out": tmp_path / "run", **SMALL[name]}
    if name == "07_without_labels":
        settings["folder"] = photographs(tmp_path / "photographs")
    result = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)
    sys.modules.pop("common", None)
    assert result.compressed.median_ms < result.original.median_ms
    assert result.steps[-1].macs < result.steps[0].macs
    assert (tmp_path / "run" / "model.onnx").is_file()


def photographs(folder):
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    for k in range(48):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{k}.png")
    return folder
