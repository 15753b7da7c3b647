"""Runs: one attempt at one task, from the slot that it takes to the moment its handler has really ended."""
