"""A training preempted on purpose, and its bytes compared."""
