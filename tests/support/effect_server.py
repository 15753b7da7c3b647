"""A server that honours idempotency keys, and outlives its callers: a file to which requests are added."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """A request that has reached the server, whether or not its caller has lived to get the answer.

    Attributes:
        kind: "do", "undo" or "check"; "stumble": a request that was rejected, and had no effect.
        step: of the saga, which the caller gives.
        key: the idempotency key.
        pid: of the calling process.
    """

    kind: str
    step: str
    key: str
    pid: int


class EffectServer:
    """Effects by their idempotency keys.

    A request is one line, in one write: a kill leaves it whole or undone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def requests(self) -> Sequence[Request]:
        """Return all requests, in the order of their arrival."""
        lines = (line.split("\t") for line in self._path.read_text().splitlines())
        return [Request(kind, step, key, int(pid)) for kind, step, key, pid in lines]

    def do(self, step: str, key: str) -> str:
        """Apply the effect of a key, unless it was applied before; return the answer, the same for each request."""
        self._add("do", step, key)
        return self._answer(step, key)

    def undo(self, step: str, key: str) -> None:
        """Undo the effect of a key, if it was applied; it is not applied after that."""
        self._add("undo", step, key)

    def check(self, step: str, key: str) -> str | None:
        """Return the answer of an effect that was applied; None: it was not."""
        self._add("check", step, key)
        return self._answer(step, key) if key in self.effects() else None

    def stumble(self, step: str, key: str) -> None:
        """Reject a request."""
        self._add("stumble", step, key)

    def _answer(self, step: str, key: str) -> str:
        first = next(number for number, each in enumerate(self.requests()) if (each.kind, each.key) == ("do", key))
        return f"{step} {first}"  # it tells an effect that was applied again from the first one

    def _add(self, kind: str, step: str, key: str) -> None:
        with self._path.open("ab", buffering=0) as file:
            file.write(f"{kind}\t{step}\t{key}\t{os.getpid()}\n".encode())

    def effects(self) -> dict[str, str]:
        """Return the steps that have an effect now, by key."""
        undone: set[str] = set()
        effects: dict[str, str] = {}
        for each in self.requests():
            if each.kind == "do" and each.key not in undone:
                effects.setdefault(each.key, each.step)
            elif each.kind == "undo":
                undone.add(each.key)
                effects.pop(each.key, None)
        return effects

    def count(self, kind: str, step: str) -> int:
        """Return how many requests of a kind there were for a step."""
        return sum((each.kind, each.step) == (kind, step) for each in self.requests())
