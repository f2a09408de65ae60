"""JSON from files that somebody else may have written."""

import json
import re
from typing import NoReturn

from compressor.errors import DataError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # what no encoder takes; this project writes characters as they are
_LARGEST = (1 << 63) - 1  # of 64 bits; an open slice ends there


def parse_json(text: str | bytes) -> dict[str, object]:
    """A JSON object.

    Raises:
        DataError: It is cut off, no JSON, nested too deep, no object, or holds NaN, infinity or a number out of any range.
    """
    try:
        value = json.loads(text, parse_constant=_refused, parse_int=_whole, parse_float=_finite)
        if _SURROGATE.search(text if isinstance(text, str) else text.decode()):  # a pair is a character, a half is none
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"not JSON, or cut off ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"should hold a JSON object, found {type(value).__name__}")
    return value


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refused(text)


def _whole(text: str) -> int:
    value = int(text) if len(text) < 24 else _LARGEST + 1
    if abs(value) > _LARGEST:
        raise ValueError(f"the number {text[:24]} is out of range")
    return value
