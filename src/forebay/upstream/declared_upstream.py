"""What a worker is said to draw on, before its first call has shown which account that is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from forebay.interfaces import LoadSource
from forebay.task import Priority
from forebay.upstream.shared_account import SharedAccount

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream


class DeclaredUpstream:
    """The accounts of an upstream on one of which the calls of a worker will draw, as one `Source`.

    Which of them it will be is known at the first call, by its API key and model, and then that account takes the place
    of this. Until then the least loaded of those that are open tells, those of the upstream's fallbacks among them; and
    while none is open, one that has what was given to the upstream, and on which nobody has called.

    Args:
        upstream: whose accounts.
        model: for which the calls will be; empty if that is not said.
    """

    def __init__(self, upstream: Upstream, model: str) -> None:
        group = upstream.accounts.settings.model_group(model) if model else ""
        self.name = ":".join(part for part in ("upstream", upstream.name, group) if part)
        self._upstream = upstream
        self._model = model
        self._lock = threading.RLock()
        self._coming = 0
        self._held: dict[object, tuple[int, Priority]] = {}
        self._relief: dict[object, Callable[[], None]] = {}
        self._on: list[SharedAccount] = []  # where what is coming and what is held back are noted; accounts come and go

    def covers(self, source: LoadSource) -> bool:
        """Whether `source`, which a run has met, is what was foretold."""
        return source.accounts[0] in self._upstream.accounts.accounts_of(self._model)

    @property
    def accounts(self) -> Sequence[SharedAccount]:
        """See `forebay.interfaces.Source`."""
        return self._desks()

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.interfaces.Source`."""
        return min(desk.load(priority) for desk in self._desks())

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """See `forebay.interfaces.Source`."""
        return min(desk.time_until_below(priority, load) for desk in self._desks())

    def may_start(self, priority: Priority) -> bool:
        """See `forebay.interfaces.Source`."""
        return any(desk.may_start(priority) for desk in self._desks())

    def typical_latency(self) -> float:
        """See `forebay.interfaces.Source`."""
        return self._desks()[0].typical_latency()

    def blocks(self, priority: Priority) -> bool:
        """See `forebay.interfaces.Source`."""
        return all(desk.blocks(priority) for desk in self._desks())

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """See `forebay.interfaces.Source`. They may come to any of the accounts, so they count in each."""
        with self._lock:
            self._desks()
            for desk in self._on:
                desk.hold_back((self, holder), runs, priority)
            if runs:
                self._held[holder] = runs, priority
            else:
                self._held.pop(holder, None)
            self._desks()

    def add_expected_calls(self, runs: int) -> None:
        """See `forebay.interfaces.Source`. Likewise."""
        with self._lock:
            self._desks()
            for desk in self._on:
                desk.add_expected_calls(runs)
            self._coming += runs
            self._desks()

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            self._relief[holder] = callback
            for desk in self._on:
                desk.on_relief((self, holder), callback)

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            for desk in self._on:
                desk.forget((self, holder))
            self._relief.pop(holder, None)
            self._held.pop(holder, None)
            self._desks()

    def _desks(self) -> list[SharedAccount]:
        """Those that there are now, what is coming and held back noted in each of them and nowhere else."""
        upstream = self._upstream
        found = dict.fromkeys(upstream.accounts.accounts_of(self._model))
        for stop in upstream.fallback_resolver.routes(self._model):
            found |= dict.fromkeys(stop.upstream.accounts.accounts_of(stop.model))
        with self._lock:
            wanted = found if self._coming or self._held else {}
            for desk in [desk for desk in self._on if desk not in wanted]:
                self._take_off(desk)
            for desk in [desk for desk in wanted if desk not in self._on]:
                self._put_on(desk)
        return list(found)

    def _put_on(self, desk: SharedAccount) -> None:
        self._on.append(desk)
        desk.add_expected_calls(self._coming)
        for who, (runs, rung) in self._held.items():
            desk.hold_back((self, who), runs, rung)
        for who, callback in self._relief.items():
            desk.on_relief((self, who), callback)

    def _take_off(self, desk: SharedAccount) -> None:
        self._on.remove(desk)
        desk.add_expected_calls(-self._coming)
        for who in {**self._held, **self._relief}:
            desk.forget((self, who))
