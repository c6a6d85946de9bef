"""Rounds: a run whose adapter is what the next run samples from."""
