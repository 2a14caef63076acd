"""Data sets: their facts (specs, which needs no torch), where they are found, and splits that give batches."""
