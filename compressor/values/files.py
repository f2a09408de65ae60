"""Files of a run: written whole or not at all, weights as safetensors, nothing pickled."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compressor.errors import DataError

PARTIAL = ".partial"
"""In the name of files that are being written; what a kill leaves of them is swept when the run goes on."""


def cache_folder() -> Path:
    """Where measurements and timing caches are kept: `COMPRESSOR_CACHE`, else the user's cache folder."""
    given = os.environ.get("COMPRESSOR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "compressor"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it takes the place of `path` once the block is done.

    A reader sees the old file or the new one, never half of it; after an error the old one is still there.

    Raises:
        DataError: The folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=PARTIAL + path.suffix)
    except OSError as error:
        raise DataError(f"cannot write to {path.parent}: {error.strerror or error}; choose another output folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        DataError: The folder cannot be written to.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write plain data as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        DataError: There is no such file, or it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; shared ones are written once per name."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, dict(metadata or {})))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `state_dict` from safetensors, or from a `.pt`/`.pth` file that holds nothing but tensors.

    Raises:
        DataError: The file is missing, cut off, or holds something else.
    """
    if not path.is_file():
        raise DataError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is cut off or holds code
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cut off, or not a file of plain tensors ({line}); save model.state_dict()") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise DataError(f"{path}: holds no state_dict of tensors; save model.state_dict()")
    return {str(name).removeprefix("module."): cast(Tensor, tensor) for name, tensor in found.items()}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a safetensors file, or cut off ({error})") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a weights file into a model, strictly (counters of batch norms may be missing).

    Raises:
        DataError: Keys or shapes do not fit (they are named), or a tensor holds NaN or infinity.
    """
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"{path}: `{name}` holds NaN or infinity")
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{label}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for label, names in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise DataError(f"{path} does not fit {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(tensors, strict=False)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
