"""Spill and refill: tasks out to the task store, back from it, and the leases on those of them that are inside."""
