"""Calling what a user has written: what goes wrong in there is told by its name, with what it was given."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from compressor.errors import CompressorError, DataError

_T = TypeVar("_T")


def called(what: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """What a function of the user's returns.

    Args:
        what: Its name with its arguments, such as `loss(outputs, batch)`; it begins the message.
        function: The function.
        arguments: What it is called with.

    Raises:
        DataError: It fails.
    """
    try:
        return function(*arguments)
    except CompressorError:
        raise
    except Exception as error:
        given = ", ".join(described(own) for own in arguments)
        line = (str(error).splitlines() or [""])[0]
        raise DataError(f"{what} failed on ({given}): {type(error).__name__}: {line}") from error


def described(value: object, depth: int = 2) -> str:
    """Type, names and shapes, in short: `dict of image (8, 3, 32, 32), mask (8, 32, 32)`."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping) and depth:
        inside = ", ".join(f"{name} {described(own, depth - 1)}" for name, own in list(value.items())[:6])
        return f"{type(value).__name__} of {inside or 'nothing'}"
    if isinstance(value, list | tuple) and depth:
        inside = ", ".join(described(own, depth - 1) for own in value[:4])
        return f"{type(value).__name__} of {inside or 'nothing'}"
    return type(value).__name__
