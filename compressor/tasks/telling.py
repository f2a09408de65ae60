"""What a function or an object of the user's is, as plain data: a run has to tell a task from another one."""

import functools
import types
from typing import Any

_DEEPEST = 8


def told(value: Any, depth: int = _DEEPEST) -> Any:
    """Plain data as they are; of functions the code with what it closes over, of metrics the type with its plain attributes."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, types.CodeType | types.FunctionType | types.MethodType | functools.partial):
        return _function(value, depth - 1)
    if isinstance(value, list | tuple | set | frozenset):
        return [told(own, depth - 1) for own in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, dict):
        return {str(name): told(own, depth - 1) for name, own in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    if not hasattr(value, "compute"):  # no metric: what else a function keeps may change while it works
        return type(value).__qualname__
    plain = {name: own for name, own in sorted(getattr(value, "__dict__", {}).items()) if not name.startswith("_")}
    kept = {name: own for name, own in plain.items() if own is None or isinstance(own, str | int | float | bool | tuple)}
    return [type(value).__qualname__, told(kept, depth - 1)]


def _function(value: Any, depth: int) -> Any:
    """Code, what it closes over, and its defaults."""
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), [told(own, depth) for own in value.co_consts]]
    if isinstance(value, types.FunctionType):
        cells = [_content(cell, depth) for cell in value.__closure__ or ()]
        defaults = [told(own, depth) for own in (value.__defaults__, value.__kwdefaults__)]
        return [value.__qualname__, told(value.__code__, depth), cells, defaults]
    if isinstance(value, types.MethodType):
        return [told(value.__func__, depth), type(value.__self__).__qualname__]
    return [told(own, depth) for own in (value.func, value.args, value.keywords)]


def _content(cell: Any, depth: int) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
    return type(value).__qualname__ if isinstance(value, list | dict | set) else told(value, depth)  # these may be written to
