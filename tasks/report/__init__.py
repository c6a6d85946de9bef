"""What a run shows: pages, sections, plots."""
