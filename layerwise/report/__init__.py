"""What people read: one offline HTML page that says in words first what was found, and the same figures as SVG files.

Decision: importing this package costs nothing. plotly and jinja2 are imported inside the functions that use them.
"""

from __future__ import annotations

from layerwise.report.html import render, write_report

__all__ = ["render", "write_report"]
