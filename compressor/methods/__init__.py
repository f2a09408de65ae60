"""Compression methods: one per file, one line each in `METHODS`."""

from typing import Any

from compressor.methods.aacp import AACP
from compressor.methods.base import Method, Problem
from compressor.methods.cap import CaP
from compressor.methods.cc import CC
from compressor.methods.factorize import Factorize
from compressor.methods.legr import LeGR
from compressor.methods.magnitude import Magnitude
from compressor.values.budget import Budget

METHODS: dict[str, Any] = {
    "aacp": AACP,
    "cap": CaP,
    "cc": CC,
    "factorize": Factorize,
    "legr": LeGR,
    "magnitude": Magnitude,
}

__all__ = ["AACP", "CC", "METHODS", "CaP", "Factorize", "LeGR", "Magnitude", "Method", "Problem", "default_method"]


def default_method(budget: Budget | None, images: bool) -> Method:
    """What is done where no method is named.

    For a latency, branches and channels: measured to be the best (`tools/bench_depth.py`). Ranks are added where MACs, parameters
    or memory are limited, which sequences of smaller layers save (`tools/bench_cc.py`); they seldom save time.

    Args:
        budget: What the network may cost.
        images: Whether there are any, for statistics; without them nothing can be repaired.
    """
    if not images:
        return Magnitude()
    timed = budget is not None and not (budget.latency is budget.drop is None and budget.front != "latency")
    return CaP(space="channels+depth" if timed else "channels+ranks+depth")
