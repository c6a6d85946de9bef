"""Many settings against each other."""
