"""Reports: one HTML file about a run, or about several side by side."""

from clouds.report.page import write_report

__all__ = ["write_report"]
