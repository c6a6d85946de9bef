"""What the judge and its pairs are worth: position, flips, agreement, length, diversity, failures, in one pass."""
