"""Data by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import DataError
from compressor.data.images import load_data


def test_digits_are_real_split_and_reproducible():
    data = load_data("digits")
    sizes = [len(part.labels) for part in (data.train, data.validate, data.test)]
    assert sum(sizes) == 1797
    assert sizes[1] >= 300
    x, y = next(iter(data.validate))
    assert x.shape[1:] == (1, 8, 8)
    assert y.dtype == torch.int64
    assert torch.equal(load_data("digits").validate.images, data.validate.images)
    seen = {tuple(image.flatten().tolist()) for image in data.test.images}
    kept = {tuple(image.flatten().tolist()) for image in data.train.images}
    assert len(seen & kept) <= 2, "test images are not trained on"  # a few digits of the set are equal


@pytest.fixture
def cifar(tmp_path):
    random = np.random.default_rng(0)
    for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
        rows = random.integers(0, 256, (200, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(200) % 10
        rows.tofile(tmp_path / name)
    return tmp_path


def test_cifar10_binary_files_are_read_in_their_layout(cifar):
    data = load_data(f"cifar10:{cifar}", batch=100)
    raw = np.fromfile(cifar / "test_batch.bin", dtype=np.uint8).reshape(-1, 3073)
    assert torch.equal(data.test.images[7], torch.from_numpy(raw[7, 1:].reshape(3, 32, 32)))
    assert data.test.labels.tolist() == raw[:, 0].tolist()
    x, _ = next(iter(data.test))
    red = (raw[0, 1] / 255 - 0.485) / 0.229
    assert x[0, 0, 0, 0] == pytest.approx(red, abs=1e-6)


def test_training_batches_are_shuffled_by_the_global_generator_and_augmented(cifar):
    data = load_data(f"cifar10:{cifar}", batch=50, limit=100)
    assert len(data.train) == 2
    torch.manual_seed(3)
    first = next(iter(data.train))
    torch.manual_seed(3)
    again = next(iter(data.train))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], next(iter(data.train))[0])
    assert first[0].shape == (50, 3, 32, 32)


def test_folders_of_images_are_classes(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for name, level in (("dark", 10), ("light", 240)):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(np.full((6, 5, 3), level, np.uint8)).save(tmp_path / split / name / f"{k}.png")
    data = load_data(f"folder:{tmp_path}", mean=(0.5,) * 3, std=(0.5,) * 3)
    x, y = next(iter(data.test))
    assert x.shape == (8, 3, 6, 5)
    assert [int(v) for v in y] == [0] * 4 + [1] * 4
    assert x[0].max() < 0 < x[-1].min()


def test_a_callable_gives_its_own_loaders(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text("def build():\n    return ['train'], ['validate']\n")
    data = load_data(f"{tmp_path / 'own_data.py'}:build")
    assert (data.train, data.validate, data.test) == (["train"], ["validate"], None)


def test_unusable_data_is_named(tmp_path, cifar):
    (tmp_path / "own.py").write_text("def raising():\n    raise ValueError('the disk is not mounted')\n")
    with pytest.raises(DataError, match="up to this callable"):
        load_data(f"{tmp_path / 'own.py'}:raising", limit=50)
    (cifar / "data_batch_3.bin").write_bytes(b"x" * 5000)
    for name, message in (
        ("imagenet", "no such data: 'imagenet'; write digits"),
        (f"cifar10:{tmp_path / 'none'}", "no such folder"),
        (f"cifar10:{cifar}", r"data_batch_3\.bin: not a file of the binary version of CIFAR-10, or cut off"),
        (f"folder:{tmp_path / 'none'}", "no such folder"),
        (f"folder:{tmp_path}", "one folder per class"),
        ("nowhere:data", "no such module: nowhere"),
        (f"{tmp_path / 'own.py'}:raising", r"own.py:raising\(\) failed: ValueError: the disk is not mounted"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(name)
    with pytest.raises(DataError, match="1 channels, mean and std have 3"):
        load_data("digits", mean=(0.5,) * 3)
