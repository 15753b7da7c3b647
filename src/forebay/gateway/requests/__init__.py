"""Requests of callers: their heads, bodies and models, and how long a caller waits."""
