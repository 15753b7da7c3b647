"""A task store that counts its calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

from forebay.interfaces import TaskStore


class CountingStore:
    """A task store that counts the calls of each method in `calls`, which several may share."""

    def __init__(self, inner: TaskStore, calls: Counter[str]) -> None:
        self._inner = inner
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls[name] += 1
            return attribute(*args, **kwargs)

        return call
