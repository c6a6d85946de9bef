"""The child that trains: torch, TRL, and its exactness."""
