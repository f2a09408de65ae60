"""Compression methods: one per file, one line each in `METHODS`."""

from typing import Any

from compressor.methods.aacp import AACP
from compressor.methods.base import Method, Problem
from compressor.methods.cap import CaP
from compressor.methods.cc import CC
from compressor.methods.factorize import Factorize
from compressor.methods.legr import LeGR
from compressor.methods.magnitude import Magnitude

METHODS: dict[str, Any] = {
    "aacp": AACP,
    "cap": CaP,
    "cc": CC,
    "factorize": Factorize,
    "legr": LeGR,
    "magnitude": Magnitude,
}

__all__ = ["AACP", "CC", "METHODS", "CaP", "Factorize", "LeGR", "Magnitude", "Method", "Problem"]
