"""A file of issued keys for tests, changed from a thread as another process would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from forebay import clock
from forebay.gateway.callers.issued_keys import IssuedKey, new_key
from forebay.gateway.callers.key_file import KeyFile
from forebay.gateway.server import Gateway

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function that blocks returns, called in a thread."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: function(*arguments))


def bearer(text: str) -> dict[str, str]:
    """Return the headers of a call with a key."""
    return {"authorization": f"Bearer {text}"}


async def refresh(gateway: Gateway) -> None:
    """Let a gateway look at its key file, as it does each second."""
    assert gateway.forwarder.keys is not None
    await gateway.forwarder.keys.refresh()


class IssuedKeys:
    """The keys in a file.

    Args:
        path: of the file, which the first key makes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def add(self, name: str, **fields: Any) -> str:
        """Create a key, and return it. It blocks."""
        text = new_key()
        with KeyFile(self.path, create=True) as file:
            file.create(IssuedKey(name=name, created_at=clock.wall_time(), **fields), text)
        return text

    async def create(self, name: str, **fields: Any) -> str:
        """Create a key, and return it."""
        return await in_thread(lambda: self.add(name, **fields))

    async def update(self, name: str, **changes: Any) -> None:
        """Change a key."""

        def change() -> None:
            with KeyFile(self.path) as file:
                file.update(name, changes)

        await in_thread(change)

    async def revoke(self, name: str) -> None:
        """Revoke a key."""

        def change() -> None:
            with KeyFile(self.path) as file:
                file.revoke(name, now=clock.wall_time())

        await in_thread(change)

    async def rotate(self, name: str, *, grace: float) -> str:
        """Give a key another secret, and return it."""
        text = new_key()

        def change() -> None:
            with KeyFile(self.path) as file:
                file.rotate(name, text, now=clock.wall_time(), grace=grace)

        await in_thread(change)
        return text
