"""Compression methods: one per file, one line each in `METHODS`."""

from typing import Any

from compressor.methods.base import Method, Problem
from compressor.methods.magnitude import Magnitude

METHODS: dict[str, Any] = {
    "magnitude": Magnitude,
}

__all__ = ["METHODS", "Magnitude", "Method", "Problem"]
