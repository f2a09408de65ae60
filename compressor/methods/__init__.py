"""Compression methods: one per file, one line each in `METHODS`."""

from typing import Any

from compressor.methods.base import Method, Problem
from compressor.methods.cap import CaP
from compressor.methods.magnitude import Magnitude

METHODS: dict[str, Any] = {
    "cap": CaP,
    "magnitude": Magnitude,
}

__all__ = ["METHODS", "CaP", "Magnitude", "Method", "Problem"]
