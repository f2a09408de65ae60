"""Checkpoints as people have them: weights nested among other things, under prefixes that a trainer or a wrapper has added.

    {"epoch": 90, "state_dict": {"module.conv1.weight": …}, "state_dict_ema": {…}, "optimizer": {…}}

Found are the tensors that have all names and shapes of the model, wherever they lie and whatever is in front of their names. Where
several do, those of a moving average (EMA) are taken, as timm and Ultralytics do, since it is what was validated.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

_DEEPEST = 3  # of nested dictionaries
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|module)(?=\.)")  # what torch.compile and DataParallel put into names
_COUNTER = "num_batches_tracked"  # of batch norms; old files have none


@dataclass(frozen=True)
class Found:
    """Tensors of a checkpoint that are for a model.

    Attributes:
        tensors: By the model's names as far as they go; what else lies under the same prefix keeps its own.
        place: Keys of the dictionaries that they were in, joined by dots.
        prefix: What was in front of their names.
        wrapped: Whether `torch.compile` or `DataParallel` had put something into them.
        passed: What was passed over: how many tensors lie beside them.
        right: How many of the model's tensors are there in the right shape.
    """

    tensors: Mapping[str, Tensor]
    place: str
    prefix: str
    wrapped: bool
    passed: int
    right: int

    @property
    def averaged(self) -> bool:
        """Whether they are those of a moving average."""
        return bool(re.search(r"(^|[._])ema([._]|$)", f"{self.place}.{self.prefix}".lower()))

    def __str__(self) -> str:
        """What was done, in one line; empty where the file is a plain `state_dict`."""
        parts = [f"of `{self.place}`"] if self.place else []
        parts += ["the moving average"] if self.averaged else []
        parts += [f"without the prefix `{self.prefix}`"] if self.prefix else []
        parts += ["without what a wrapper put into the names"] if self.wrapped else []
        parts += [f"{self.passed} other tensor{'s'[: self.passed > 1]} left"] if self.passed else []
        return ", ".join(parts)


def weights_for(own: Mapping[str, Tensor], loaded: object) -> Found | None:
    """The tensors of a checkpoint that fit a model best.

    Args:
        own: The model's `state_dict`.
        loaded: What the file holds.

    Returns:
        None where it holds no tensors by name.
    """
    found = [one for place, tensors in _dictionaries(loaded) for one in _readings(own, place, tensors)]
    return max(found, key=lambda one: (one.right, one.averaged, -len(one.place), not one.wrapped, -len(one.prefix)), default=None)


def _dictionaries(value: object, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(value, Mapping) or depth > _DEEPEST:
        return
    tensors = {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if tensors:
        yield place, tensors
    for name, inner in value.items():
        yield from _dictionaries(inner, f"{place}.{name}".lstrip("."), depth + 1)


def _readings(own: Mapping[str, Tensor], place: str, tensors: Mapping[str, Tensor]) -> Iterator[Found]:
    """With the names as they are, and without what wrappers have put into them, under every prefix that there is."""
    plain = {_WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip("."): tensor for name, tensor in tensors.items()}
    for names in (tensors, plain) if plain.keys() != tensors.keys() else (tensors,):
        for prefix in sorted(_prefixes(own, names), key=len):
            mine = {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}
            right = sum(name in mine and mine[name].shape == tensor.shape for name, tensor in own.items() if _COUNTER not in name)
            yield Found(mine, place, prefix, names is not tensors, len(names) - len(mine), right)


def _prefixes(own: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> set[str]:
    """What stands in front of the model's names; nothing, at least."""
    found = {""}
    for mine in list(own)[:3]:
        found |= {name.removesuffix(mine) for name in names if name.endswith(f".{mine}")}
    return found
