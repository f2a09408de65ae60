"""What all pages share: the style, and tables."""

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #dde2ea; text-align: right } th { background: #f4f6f9 }
th:first-child, td:first-child { text-align: left }
.lead { font-size: 1.1rem } .missed { color: #b3261e; font-weight: 600 } .met { color: #1b7f3b; font-weight: 600 }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto } code { background: #f4f6f9; padding: 0 .25rem }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML already, headers are not."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
