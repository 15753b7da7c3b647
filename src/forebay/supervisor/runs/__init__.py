"""Runs: one attempt at one task, from the slot it takes to the end of its handler."""
