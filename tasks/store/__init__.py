"""Where things are: workspace, files, references, rows."""
