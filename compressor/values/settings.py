"""Settings of methods and passes: frozen dataclasses, checked against the type hints of their fields and against ranges."""

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from compressor.errors import CompressorError

SAID: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}
"""Plain types in words."""


def check(
    settings: Any,
    error: type[CompressorError],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    known: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Raise an error where a setting is of another type than its hint says, or out of range; the setting and its value are named.

    Numbers of numpy become plain ones, which can be written to a file.

    Args:
        settings: A dataclass.
        error: Of which class.
        ranges: Setting -> least and highest, both of which are in it.
        known: Setting -> what it may be, where its hint is no `Literal`.
    """
    ranges, hints = ranges or {}, get_type_hints(type(settings))
    names = {name: tuple(own) for name, own in (known or {}).items()}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(settings, field.name, value)
        said = f"{type(settings).__name__}({field.name}={value!r})"
        choices = names.get(field.name, choices_of(hints[field.name]))
        if choices:
            if value not in choices and not (value is None and NoneType in kinds_of(hints[field.name])):
                raise error(f"{said}: known are {', '.join(choices)}")
            continue
        if not any(_is(value, kind) for kind in kinds_of(hints[field.name])):
            such = "" if field.default is MISSING else f", such as {field.default!r}"
            raise error(f"{said}: {_expected(hints[field.name])} is expected{such}")
        if value is None or field.name not in ranges:
            continue
        least, highest = ranges[field.name]
        if not least <= value <= highest:
            asked = f"be at least {least:g}" if math.isinf(highest) else f"lie between {least:g} and {highest:g}"
            raise error(f"{said}: must {asked}")


def kinds_of(hint: Any) -> list[Any]:
    """The plain types of a type hint; texts for `Literal`."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in kinds_of(part)]
    return [type(value) for value in get_args(hint)] if get_origin(hint) is Literal else [hint]


def choices_of(hint: Any) -> tuple[str, ...]:
    """The texts of a type hint's `Literal`."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(choice for part in get_args(hint) for choice in choices_of(part))
    return get_args(hint) if get_origin(hint) is Literal else ()


def _expected(hint: Any) -> str:
    return " or ".join(SAID.get(kind) or f"{kind.__name__}(…)" for kind in kinds_of(hint))


def _is(value: object, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool  # it is an `int` as well
    return isinstance(value, (int, float) if kind is float else kind)
