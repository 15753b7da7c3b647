"""What a worker is said to draw on, before its first call has shown which account that is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from forebay.task import Priority
from forebay.typing import Source
from forebay.upstream.desk import Desk

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream


class Foretold:
    """The accounts of an upstream on one of which the calls of a worker will draw, as one `Source`.

    Which of them it will be is known at the first call, by its API key and model, and then that account takes the place
    of this. Until then the least loaded of those that are open tells, those of the upstream's fallbacks among them; and
    while none is open, one that has what was given to the upstream, and on which nobody has called.

    Args:
        upstream: whose accounts.
        model: for which the calls will be; empty if that is not said.
    """

    def __init__(self, upstream: Upstream, model: str) -> None:
        group = upstream.books.terms.group(model) if model else ""
        self.name = ":".join(part for part in ("upstream", upstream.name, group) if part)
        self._upstream = upstream
        self._model = model
        self._lock = threading.RLock()
        self._coming = 0
        self._held: dict[object, tuple[int, Priority]] = {}
        self._relief: dict[object, Callable[[], None]] = {}
        self._on: list[Desk] = []  # where what is coming and what is held back are noted; accounts come and go

    def covers(self, source: Source) -> bool:
        """Whether `source`, which a run has met, is what was foretold."""
        return source.parts[0] in self._upstream.books.of(self._model)

    @property
    def parts(self) -> Sequence[Desk]:
        """See `forebay.typing.Source`."""
        return self._desks()

    def load(self, rung: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.typing.Source`."""
        return min(desk.load(rung) for desk in self._desks())

    def room(self, rung: Priority, load: float) -> tuple[float, float]:
        """See `forebay.typing.Source`."""
        return min(desk.room(rung, load) for desk in self._desks())

    def may_start(self, rung: Priority) -> bool:
        """See `forebay.typing.Source`."""
        return any(desk.may_start(rung) for desk in self._desks())

    def typical(self) -> float:
        """See `forebay.typing.Source`."""
        return self._desks()[0].typical()

    def shuts_out(self, rung: Priority) -> bool:
        """See `forebay.typing.Source`."""
        return all(desk.shuts_out(rung) for desk in self._desks())

    def hold_back(self, who: object, runs: int, rung: Priority = Priority.NORMAL) -> None:
        """See `forebay.typing.Source`. They may come to any of the accounts, so they count in each."""
        with self._lock:
            self._desks()
            for desk in self._on:
                desk.hold_back((self, who), runs, rung)
            if runs:
                self._held[who] = runs, rung
            else:
                self._held.pop(who, None)
            self._desks()

    def coming(self, runs: int) -> None:
        """See `forebay.typing.Source`. Likewise."""
        with self._lock:
            self._desks()
            for desk in self._on:
                desk.coming(runs)
            self._coming += runs
            self._desks()

    def on_relief(self, who: object, callback: Callable[[], None]) -> None:
        """See `forebay.typing.Source`."""
        with self._lock:
            self._relief[who] = callback
            for desk in self._on:
                desk.on_relief((self, who), callback)

    def forget(self, who: object) -> None:
        """See `forebay.typing.Source`."""
        with self._lock:
            for desk in self._on:
                desk.forget((self, who))
            self._relief.pop(who, None)
            self._held.pop(who, None)
            self._desks()

    def _desks(self) -> list[Desk]:
        """Those that there are now, what is coming and held back noted in each of them and nowhere else."""
        upstream = self._upstream
        found = dict.fromkeys(upstream.books.of(self._model))
        for stop in upstream.detours.stops(self._model):
            found |= dict.fromkeys(stop.upstream.books.of(stop.model))
        with self._lock:
            wanted = found if self._coming or self._held else {}
            for desk in [desk for desk in self._on if desk not in wanted]:
                self._take_off(desk)
            for desk in [desk for desk in wanted if desk not in self._on]:
                self._put_on(desk)
        return list(found)

    def _put_on(self, desk: Desk) -> None:
        self._on.append(desk)
        desk.coming(self._coming)
        for who, (runs, rung) in self._held.items():
            desk.hold_back((self, who), runs, rung)
        for who, callback in self._relief.items():
            desk.on_relief((self, who), callback)

    def _take_off(self, desk: Desk) -> None:
        self._on.remove(desk)
        desk.coming(-self._coming)
        for who in {**self._held, **self._relief}:
            desk.forget((self, who))
