"""Proof on held-out prompts."""
