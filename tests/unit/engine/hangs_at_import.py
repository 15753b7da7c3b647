"""A module of a handler whose import does not end."""

from __future__ import annotations

import signal

signal.pause()
