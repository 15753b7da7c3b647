"""Measurements, each a ratio against something run beside it: ``.venv/bin/python -m bench NAME --json FILE``."""
