"""The report of a run: one self-contained HTML page."""

from compressor.report.run_page import write_report

__all__ = ["write_report"]
