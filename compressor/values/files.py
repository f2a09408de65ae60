"""Files of a run: written whole or not at all, weights as safetensors, nothing pickled."""

import argparse
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.values.checkpoints import weights_for
from compressor.values.json_text import parse_json
from compressor.values.plan import digest_of

_LARGEST_JSON = 1 << 26  # bytes
SEAL = "seal"
"""Key of the digest that a sealed file holds of itself."""
PARTIAL = ".partial"
"""In the name of files that are being written; what a kill leaves of them is swept when the run goes on."""


def cache_folder() -> Path:
    """Where measurements and timing caches are kept: `COMPRESSOR_CACHE`, else the user's cache folder."""
    given = os.environ.get("COMPRESSOR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "compressor"
    except RuntimeError:  # a user without a home, as in many containers
        return Path(tempfile.gettempdir()) / f"compressor-{os.getuid()}"


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


def write_sealed(path: Path, value: Mapping[str, object]) -> None:
    """Write plain data as JSON with a digest of itself, atomically: `read_json` then finds out what was changed."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, SEAL: digest_of(plain)})


def read_json(path: Path, advice: str = "remove it, and the same command makes it anew") -> dict[str, object]:
    """Read a JSON object; a seal is checked where there is one.

    Args:
        path: The file.
        advice: What to do about a damaged one.

    Raises:
        DataError: There is no such file, it is no JSON object, or was changed since it was written.
    """
    data = read_bytes(path, _LARGEST_JSON)
    try:
        value = parse_json(data)
    except DataError as error:
        raise DataError(f"{path}: {error}; {advice}") from error
    seal = value.pop(SEAL, None)
    if seal is not None and seal != digest_of(value):
        raise DataError(f"{path} was changed since it was written, or is damaged; {advice}")
    return value


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Read a plain file: a pipe or a device would keep its reader waiting.

    Args:
        path: The file.
        most: Bytes; a larger one is refused unread.

    Raises:
        DataError: There is no such file, it is no plain one, too large, or cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} cannot be read: it is no plain file")
        if most is not None and found.st_size > most:
            raise DataError(f"{path} cannot be read: it has {found.st_size:,} bytes, at most {most:,} are expected")
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, too
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def digest_of_file(path: Path) -> str:
    """SHA-256 in hexadecimal digits.

    Raises:
        DataError: See `read_bytes`.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; shared ones are written once per name."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, dict(metadata or {})))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `state_dict` from safetensors, or from a `.pt`/`.pth` file that holds nothing but tensors.

    Raises:
        DataError: The file is missing, cut off, or holds something else.
    """
    found = _loaded(path)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise DataError(f"{path}: holds no state_dict of tensors; save model.state_dict()")
    return cast(dict[str, Tensor], found)


def _loaded(path: Path) -> object:
    """What a file of weights holds; nothing of it is run."""
    if not path.exists():
        raise DataError(f"no such weights file: {path}")
    data = read_bytes(path)
    if path.suffix == ".safetensors":
        return tensors_from(data, path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]):  # what trainers keep of their own arguments
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is cut off or holds code
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cut off, or not a file of plain tensors ({line}); save model.state_dict()") from error


def tensors_from(data: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of the bytes of a safetensors file; the path is for messages.

    Raises:
        DataError: It is cut off, or something else.
    """
    try:
        return load(data)
    except Exception as error:  # its own kinds, and those of torch for a type or size that there is not
        raise DataError(f"{path}: not a safetensors file, or cut off ({error})") from error


def have_to_be_finite(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that are no numbers by mistake only: parameters and running statistics; a mask may be infinite."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if "running_" in name}
    return {**dict(model.named_parameters()), **buffers}


def check_finite(tensors: Mapping[str, Tensor], whose: object, own: Mapping[str, Tensor] | None = None) -> None:
    """Refuse tensors that hold NaN or infinity.

    Args:
        tensors: What was read.
        whose: A file or a model, for the message.
        own: What the model holds itself: where that is infinite (a mask), the same is allowed.

    Raises:
        DataError: Some tensor does; it is named.
    """
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            mine, off = (own or {}).get(name), ~torch.isfinite(tensor)
            if mine is None or mine.shape != tensor.shape or not torch.equal(tensor[off], mine.cpu()[off].to(tensor.dtype)):
                raise DataError(f"{whose}: `{name}` holds NaN or infinity; train it again, or load other weights")


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a weights file into a model, strictly (counters of batch norms may be missing).

    The file may be a checkpoint: the weights are found in it, whatever is around them and in front of their names.

    Returns:
        What was done to find them, in one line; empty where the file is a plain `state_dict`.

    Raises:
        DataError: Keys or shapes do not fit (they are named), or a tensor holds NaN or infinity.
    """
    own = model.state_dict()
    found = weights_for(own, _loaded(path))
    if found is None:
        raise DataError(f"{path}: holds no state_dict of tensors; save model.state_dict()")
    tensors = found.tensors
    check_finite(tensors, path, own)
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
    return str(found)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
