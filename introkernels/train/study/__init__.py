"""Studies: every method tuned with the same budget, compared on fresh seeds, reported honestly."""
