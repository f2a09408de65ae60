"""One file per op family; importing this package fills the tables `RULES` and `EDITS`."""

from compressor.passes.rules import elementwise, mixers, movers, norms, reducers
from compressor.passes.rules.base import EDITS, RULES, Call, Change, edit, key_of, rule

__all__ = [
    "EDITS",
    "RULES",
    "Call",
    "Change",
    "edit",
    "elementwise",
    "key_of",
    "mixers",
    "movers",
    "norms",
    "reducers",
    "rule",
]
