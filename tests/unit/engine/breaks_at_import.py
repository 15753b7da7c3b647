"""A module of a handler that cannot be imported."""

from __future__ import annotations

handler = 1 / 0
