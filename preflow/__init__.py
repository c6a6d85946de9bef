"""The `preflow` command: what a person types. It calls flows and tasks, and nothing calls it."""
