"""Backpressure for fleets of AI agents."""
