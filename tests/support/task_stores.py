"""The task stores that the tests run on. A new one adds a line to STORES, and is tested for every promise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

DURABLE = "durable"  # an acknowledged write survives the process
SHARED = "shared"  # several processes may have it open at once


@dataclass(frozen=True)
class StoreBackend:
    """A kind of task store, and the promises that it makes beyond those that all make.

    Attributes:
        name: as it appears in the ids of tests.
        template: its URL; ``{path}`` is a directory of the test, ``{bound}`` how many tasks may wait or be leased.
        can: DURABLE, SHARED.
        options: appended to the URL, one for each way to write; the last is the fastest.
    """

    name: str
    template: str
    can: frozenset[str] = frozenset()
    options: tuple[str, ...] = ("",)

    def __str__(self) -> str:
        return self.name

    def needs(self, capability: str) -> None:
        """Skip the test if the store lacks `capability`."""
        if capability not in self.can:
            pytest.skip(f"{self.name} is not {capability}")

    def url(self, directory: Path, *, bound: int = 10_000, options: str = "") -> str:
        """Return the URL of the store that this backend has in `directory`."""
        return self.template.format(path=directory, bound=bound) + options

    def fast_url(self, directory: Path, *, bound: int = 10_000) -> str:
        """Return the same URL, for a store that need not survive a loss of power."""
        return self.url(directory, bound=bound, options=self.options[-1])


STORES = [
    StoreBackend("memory", "memory://?bound={bound}"),
    StoreBackend(
        "sqlite",
        "sqlite:///{path}/store.db?bound={bound}",
        can=frozenset({DURABLE, SHARED}),
        options=("&synchronous=full", "&synchronous=normal", "&synchronous=off"),
    ),
]
DURABLE_STORES = [backend for backend in STORES if DURABLE in backend.can]
SHARED_STORES = [backend for backend in DURABLE_STORES if SHARED in backend.can]
OVERFLOWS: list[StoreBackend | None] = [None, *STORES]  # what a supervisor may have


def overflow_url(backend: StoreBackend | None, directory: Path, *, bound: int = 10_000) -> str | None:
    """Return the fastest URL for `overflow=`, or None for a supervisor without one."""
    return None if backend is None else backend.fast_url(directory, bound=bound)
