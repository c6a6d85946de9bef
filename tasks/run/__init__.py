"""A whole run: preflight, inputs, approval, logs."""
