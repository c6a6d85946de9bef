"""The report: sections made of plain data, as one self-contained HTML page, as markdown and as terminal tables."""

from tasks.reporting.page import Example, Picture, ReportSection, Table
from tasks.reporting.render import render_html, render_markdown, render_text_table
from tasks.reporting.sections import (
    cost_section,
    evaluation_section,
    lineage_section,
    live_section,
    pairs_section,
    quality_section,
    sample_rows,
    training_section,
)

__all__ = [
    "Example",
    "Picture",
    "ReportSection",
    "Table",
    "cost_section",
    "evaluation_section",
    "lineage_section",
    "live_section",
    "pairs_section",
    "quality_section",
    "render_html",
    "render_markdown",
    "render_text_table",
    "sample_rows",
    "training_section",
]
