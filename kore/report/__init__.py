"""Self-contained HTML reports: one file with inline figures, no script and nothing loaded from elsewhere."""

from kore.report.page import Report

__all__ = ["Report"]
