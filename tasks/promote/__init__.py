"""The gate, the pointer to what is served, and vLLM."""
