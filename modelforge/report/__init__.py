"""What a bundle's records and report files say, for people: data, a terminal summary, one HTML page.

Knows the bundle format and its errors; no numpy, no graph, no compiler, no forge. What it reads is not trusted.
"""

from modelforge.report.collect import Report, VariantReport, collect
from modelforge.report.page import render_html, write_html

__all__ = ["Report", "VariantReport", "collect", "render_html", "write_html"]
