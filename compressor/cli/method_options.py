"""From the options of a command to a method with its settings: those that were given, everything else as the method has it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

from compressor.errors import BudgetError
from compressor.methods import METHODS, Method
from compressor.values.settings import SAID, kinds_of

_SEARCHES = ("trials", "sampler", "fitness", "space", "parallel")
OPTIONS: dict[str, tuple[str, ...]] = {
    "magnitude": ("criterion", "scope"),
    "cap": ("floor", "space"),
    "cc": ("space", "units"),
    "factorize": ("form", "ranks", "steps"),
    "legr": _SEARCHES,
    "aacp": (*_SEARCHES, "steps"),
}
"""Method -> its own options of the command; what it has besides is reached by `--set`."""

_FIELDS = {"ranks": "choice", "fitness": "fitness.repair"}  # where the setting has another name


def method_of(
    named: str | Method,
    given: Mapping[str, object],
    settings: Sequence[str] = (),
    published: bool = False,
    images: int | None = None,
) -> Any:
    """A method.

    Args:
        named: The method's name, or a method to begin with.
        given: Option -> its value; None where it was not given.
        settings: `setting=value`, of a setting of a setting `fitness.steps=100`.
        published: Whether to begin with the released code's settings instead of the defaults.
        images: At most so many for the statistics of compensation, where there is one; None for its own number.

    Raises:
        BudgetError: An option is of another method, a setting is not there, or out of range.
    """
    name = named if isinstance(named, str) else named.name
    for option, value in given.items():
        if value is not None and option not in OPTIONS.get(name, ()):
            owners = " and ".join(own for own, options in OPTIONS.items() if option in options)
            raise BudgetError(f"--{option} is an option of {owners}, not of {name}")
    if published and not hasattr(METHODS[name], "published"):
        have = ", ".join(own for own, kind in METHODS.items() if hasattr(kind, "published"))
        raise BudgetError(f"--published: nothing was published as {name}; there are {have}")
    method: Any = METHODS[name].published() if published else METHODS[name]() if isinstance(named, str) else named
    changes: dict[str, object] = {_FIELDS.get(option, option): value for option, value in given.items() if value is not None}
    for option in changes:
        if option.partition(".")[0] not in {field.name for field in fields(method)}:
            as_published = "as published, " if published else ""
            raise BudgetError(f"--{option}: {as_published}{name} has no such setting")
    if changes.get("form") == "cp" and "choice" not in changes:
        changes["choice"] = "rate"  # it has no energy by ranks
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise BudgetError(f"--set {text}: write setting=value, such as gamma=0.9")
        changes[key.strip()] = _parsed(key.strip(), value.strip(), method)
    if images is not None and method.compensation is not None:
        changes.setdefault("compensation.images", images)
    return _changed(method, changes)


def _changed(settings: Any, changes: Mapping[str, object]) -> Any:
    """With all changes at once, as some settings only go together."""
    own: dict[str, object] = {key: value for key, value in changes.items() if "." not in key}
    for part in sorted({key.partition(".")[0] for key in changes if "." in key}):
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{part}.")}
        if part not in own:
            own[part] = _changed(getattr(settings, part), inner)
    return replace(settings, **own)


def _parsed(key: str, text: str, method: Any) -> object:
    """The value of a setting from its text, by the type of the one that is there."""
    owner: Any = method
    *path, last = key.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    names = [field.name for field in fields(owner)] if is_dataclass(owner) else []
    if last not in names:
        has = f"`{path[0]}` of {method.name}" if path else method.name
        raise BudgetError(f"--set {key}={text}: there is no such setting; {has} has {', '.join(names) or 'none'}")
    words = {"none": None, "true": True, "false": False}
    allowed = kinds_of(get_type_hints(type(owner))[last])
    if text.lower() in words and type(words[text.lower()]) in allowed:
        return words[text.lower()]
    for kind in (int, float):
        if kind in allowed:
            with suppress(ValueError):
                return kind(text)
    if str in allowed:
        return text
    said = " or ".join(SAID[kind] for kind in allowed if kind in SAID)
    if any(is_dataclass(kind) for kind in allowed):
        raise BudgetError(
            f"--set {key}={text}: it has settings of its own{f', or is {said}' if said else ''}; write {key}.NAME=value"
        )
    raise BudgetError(f"--set {key}={text}: {said} is expected, such as {getattr(owner, last)}")
