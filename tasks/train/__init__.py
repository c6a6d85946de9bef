"""The parent of a training: no torch."""
