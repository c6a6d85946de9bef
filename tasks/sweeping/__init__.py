"""A sweep: its points, what they will cost, what came of them, and the page that shows it."""
