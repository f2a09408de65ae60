"""Data by name, for the command: `digits`, `cifar10:DIR`, `folder:DIR`, `module:callable`.

Every source is split into training data, a hold-out of it (which decisions rest on), and test data (looked
at once, at the end). Images lie in memory as bytes and are normalised batch by batch.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor.data.user_models import called
from compressor.errors import DataError
from compressor.tasks.samples import Batches, Samples
from compressor.values.files import read_bytes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"})


@dataclass(frozen=True)
class Images:
    """Batches of normalised images; iterating again gives another order where `shuffle` is set.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        mean: Per channel, of values in 0..1.
        std: Per channel.
        batch: Batch size.
        shuffle: Draw the order from torch's global generator.
        augment: Pixels of padding for random crops, with random horizontal flips; 0 for none.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int = 128
    shuffle: bool = False
    augment: int = 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`(inputs float32 (n, C, H, W), labels (n,))`."""
        count = len(self.labels)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        for index in torch.tensor_split(order, tuple(range(self.batch, count, self.batch))):
            x = self.images[index]
            if self.augment:
                x = _crop_and_flip(x, self.augment)
            yield (x.float() / 255 - mean) / std, self.labels[index]

    def part(self, index: Tensor) -> "Images":
        """The samples of an index list."""
        return replace(self, images=self.images[index], labels=self.labels[index])


@dataclass(frozen=True)
class Data:
    """Training data, a hold-out of it, and test data.

    Attributes:
        train: Shuffled and augmented.
        validate: The hold-out.
        test: Or None, where the source has none.
    """

    train: Batches
    validate: Batches
    test: Batches | None

    @property
    def plain(self) -> Batches:
        """The training data as they are, in their order: without augmentation, for statistics."""
        return unaugmented(self.train)


def unaugmented(batches: Batches) -> Batches:
    """The same images as they are, in their order, where these are `Images`; others come back as they are."""
    if isinstance(batches, Samples):
        return replace(batches, batches=unaugmented(batches.batches))
    return replace(batches, shuffle=False, augment=0) if isinstance(batches, Images) else batches


def load_data(
    name: str,
    batch: int = 128,
    limit: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Data:
    """Load data by name.

    Args:
        name: `digits`; `cifar10:DIR` (the official binary version); `folder:DIR` (one folder per class, or
            `train`, `val` and `test` folders of such); `module:callable` or `file.py:callable` that returns
            `(train, validate)` or `(train, validate, test)`.
        batch: Batch size.
        limit: At most this many training images; not of a callable.
        mean: Per channel, of values in 0..1; ImageNet's by default (digits: their own); a callable has its own.
        std: Per channel.

    Raises:
        DataError: There is no such data, or it is malformed.
    """
    kind, _, rest = name.partition(":")
    source = _SOURCES.get(kind)
    if source is None:
        if limit is not None:
            raise DataError(f"{name}: how many training images there are is up to this callable; it cannot be limited to {limit}")
        return _from_callable(name)
    train, test, augment = source(rest)
    channels = train.images.shape[1]
    own_mean, own_std = mean or train.mean, std or train.std
    if len(own_mean) != channels or len(own_std) != channels:
        raise DataError(f"{name}: the images have {channels} channels, mean and std have {len(own_mean)} and {len(own_std)} values")
    train = replace(train, batch=batch, mean=own_mean, std=own_std)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    held = min(max(len(order) // 10, 300), len(order) // 3, 5000)  # 300: one image should not be half a point
    validate, rest_of_train = train.part(order[:held]), train.part(order[held:][:limit])
    if held == 0:
        raise DataError(f"{name}: {len(order)} images are too few to hold some of them out")
    final = None if test is None else replace(test, batch=batch, mean=own_mean, std=own_std)
    return Data(replace(rest_of_train, shuffle=True, augment=augment), validate, final)


def load_images(
    name: str,
    batch: int = 128,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    limit: int | None = None,
) -> Images:
    """Images without labels, for statistics.

    Args:
        name: A folder; every image in it and below counts.
        batch: Batch size.
        mean: Per channel, of values in 0..1; ImageNet's by default.
        std: Per channel.
        limit: At most this many, drawn at random (always the same ones): folders are often sorted by class.

    Raises:
        DataError: There is no such folder, an image cannot be read, or they differ in size.
    """
    root = Path(name)
    if not root.is_dir():
        raise DataError(f"{name}: no such folder of images")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    found = _read_images(root, [files[k] for k in order[:limit]])
    return Images(found, torch.zeros(len(found), dtype=torch.int64), mean or IMAGENET_MEAN, std or IMAGENET_STD, batch)


def _digits(rest: str) -> tuple[Images, Images | None, int]:
    del rest
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    images = torch.from_numpy((found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    everything = Images(images, labels, (0.305,), (0.376,))
    return everything.part(order[360:]), everything.part(order[:360]), 1


def _cifar10(rest: str) -> tuple[Images, Images | None, int]:
    folder = Path(rest)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    if not rest or not folder.is_dir():
        raise DataError(f"cifar10:{rest}: no such folder; give the one with data_batch_1.bin … test_batch.bin")
    train = [_cifar10_file(folder / f"data_batch_{k}.bin") for k in range(1, 6)]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    test_images, test_labels = _cifar10_file(folder / "test_batch.bin")
    train_set = Images(images, labels, IMAGENET_MEAN, IMAGENET_STD)
    return train_set, replace(train_set, images=test_images, labels=test_labels), 4


def _cifar10_file(path: Path) -> tuple[Tensor, Tensor]:
    """One label byte, then 1024 red, green and blue bytes per image."""
    raw = np.frombuffer(read_bytes(path), dtype=np.uint8)
    if raw.size == 0 or raw.size % 3073 or raw.reshape(-1, 3073)[:, 0].max() > 9:
        raise DataError(
            f"{path}: not a file of the binary version of CIFAR-10, or cut off ({raw.size} bytes, not a multiple of 3073)"
        )
    rows = torch.from_numpy(raw.reshape(-1, 3073).copy())
    return rows[:, 1:].reshape(-1, 3, 32, 32).clone(), rows[:, 0].long()


def _folder(rest: str) -> tuple[Images, Images | None, int]:
    root = Path(rest)
    if not rest or not root.is_dir():
        raise DataError(f"folder:{rest}: no such folder")
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    base = parts.get("train", root)
    classes = sorted(path.name for path in base.iterdir() if path.is_dir())
    test = parts.get("test", parts.get("val")) if "train" in parts else None
    if len(classes) < 2:
        raise DataError(f"{base}: expected one folder per class, found {len(classes)} folders")
    train_set = _read_folder(base, classes)
    return train_set, None if test is None else _read_folder(test, classes), 0


def _read_folder(base: Path, classes: list[str]) -> Images:
    files = [sorted(p for p in (base / name).rglob("*") if p.suffix.lower() in _SUFFIXES) for name in classes]
    images = _read_images(base, [path for own in files for path in own])
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(own) for own in files]))
    return Images(images, labels, IMAGENET_MEAN, IMAGENET_STD)


def _read_images(base: Path, files: Sequence[Path]) -> Tensor:
    """uint8 (N, 3, H, W)."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError("reading images needs pillow: pip install pillow") from error
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # a few bytes that unpack to gigabytes
    images: list[np.ndarray] = []
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is no plain file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, *bombs) as error:
            raise DataError(f"{path}: not an image, or cut off ({error})") from error
        if images[-1].shape != images[0].shape:
            raise DataError(f"{path} is {images[-1].shape[:2]}, the first image {images[0].shape[:2]}; resize them to one size")
    if not images:
        raise DataError(f"{base}: no images in it ({', '.join(sorted(_SUFFIXES))})")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _from_callable(name: str) -> Data:
    if ":" not in name:
        raise DataError(f"no such data: {name!r}; write digits, cifar10:DIR, folder:DIR or module:callable")
    found = called(name)
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        raise DataError(f"{name} must return (train, validate) or (train, validate, test), it returned {type(found).__name__}")
    return Data(found[0], found[1], found[2] if len(found) == 3 else None)


_SOURCES: dict[str, Callable[[str], tuple[Images, Images | None, int]]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "folder": _folder,
}


def _crop_and_flip(x: Tensor, pad: int) -> Tensor:
    """Random crops of the zero-padded images, and flips of half of them; digits (one channel) are not flipped."""
    count, channels, height, width = x.shape
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    top = torch.randint(0, 2 * pad + 1, (count, 1, 1, 1))
    left = torch.randint(0, 2 * pad + 1, (count, 1, 1, 1))
    rows = top + torch.arange(height).view(1, 1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, 1, -1)
    if channels > 1:
        flip = torch.rand(count, 1, 1, 1) < 0.5
        columns = torch.where(flip, columns.flip(3), columns)
    sample = torch.arange(count).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(1, -1, 1, 1)
    return padded[sample, channel, rows, columns]
