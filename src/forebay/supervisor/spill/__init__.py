"""Spilling tasks to the overflow store and refilling from it."""
