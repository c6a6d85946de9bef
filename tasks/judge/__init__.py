"""Verdicts of an LLM judge, and the pairs made of them."""
