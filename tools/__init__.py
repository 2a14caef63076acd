"""Commands of the second rank: python -m tools.NAME."""
