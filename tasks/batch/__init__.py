"""Many paid requests as cached Prefect tasks."""
