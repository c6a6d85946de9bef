"""The report: sections made of plain data, as one self-contained HTML page, as markdown and as terminal tables."""

from tasks.reporting.overview import (
    Figure,
    approval_section,
    glance_section,
    inputs_section,
    quality_figures,
    training_figures,
    verdict,
    win_rate_figures,
)
from tasks.reporting.page import Example, Picture, ReportSection, Table
from tasks.reporting.render import render_html, render_markdown, render_text_table
from tasks.reporting.sections import (
    SampleLengths,
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
    "Figure",
    "Picture",
    "ReportSection",
    "SampleLengths",
    "Table",
    "approval_section",
    "cost_section",
    "evaluation_section",
    "glance_section",
    "inputs_section",
    "lineage_section",
    "live_section",
    "pairs_section",
    "quality_figures",
    "quality_section",
    "render_html",
    "render_markdown",
    "render_text_table",
    "sample_rows",
    "training_figures",
    "training_section",
    "verdict",
    "win_rate_figures",
]
