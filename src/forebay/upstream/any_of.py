"""A load source made of several accounts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from forebay._fork import reset_in_child
from forebay.task import Priority
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount


class AnyOf:
    """Several accounts, any of which can serve the calls of a run, as one `LoadSource`: the least loaded one counts.

    So a run that any of them could serve is neither rejected nor held back because another is full. Runs that are
    expected or held back may come to any of the accounts, so they count in each.

    Args:
        name: its name in messages.
        find: returns the accounts, at least one. They may change from one call to the next: expected and held-back
            runs move with them.
    """

    def __init__(self, name: str, find: Callable[[], Sequence[ThreadSafeAccount]]) -> None:
        self.name = name
        self._find = find
        self._lock = threading.RLock()
        self._expected = 0
        self._held: dict[object, tuple[int, Priority]] = {}
        self._relief: dict[object, Callable[[], None]] = {}
        self._registered: list[ThreadSafeAccount] = []  # the accounts that count the expected and held-back runs
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The runs are the parent's."""
        self._lock = threading.RLock()
        self._expected = 0
        self._held, self._relief, self._registered = {}, {}, []

    @property
    def accounts(self) -> Sequence[ThreadSafeAccount]:
        """See `forebay.interfaces.LoadSource`."""
        return self._members()

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.interfaces.LoadSource`."""
        return min(account.load(priority) for account in self._members())

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """See `forebay.interfaces.LoadSource`."""
        return min(account.time_until_below(priority, load) for account in self._members())

    def may_start(self, priority: Priority) -> bool:
        """See `forebay.interfaces.LoadSource`."""
        return any(account.may_start(priority) for account in self._members())

    def typical_latency(self) -> float:
        """See `forebay.interfaces.LoadSource`."""
        return self._members()[0].typical_latency()

    def blocks(self, priority: Priority) -> bool:
        """See `forebay.interfaces.LoadSource`."""
        return all(account.blocks(priority) for account in self._members())

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self._members()
            for account in self._registered:
                account.hold_back((self, holder), runs, priority)
            if runs:
                self._held[holder] = runs, priority
            else:
                self._held.pop(holder, None)
            self._members()

    def add_expected_calls(self, runs: int) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self._members()
            for account in self._registered:
                account.add_expected_calls(runs)
            self._expected += runs
            self._members()

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self._relief[holder] = callback
            for account in self._registered:
                account.on_relief((self, holder), callback)

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            for account in self._registered:
                account.forget((self, holder))
            self._relief.pop(holder, None)
            self._held.pop(holder, None)
            self._members()

    def _members(self) -> Sequence[ThreadSafeAccount]:
        """Return the accounts, after moving the expected and held-back runs to them."""
        members = self._find()
        with self._lock:
            wanted: Sequence[ThreadSafeAccount] = members if self._expected or self._held else ()
            for account in [account for account in self._registered if account not in wanted]:
                self._unregister(account)
            for account in [account for account in wanted if account not in self._registered]:
                self._register(account)
        return members

    def _register(self, account: ThreadSafeAccount) -> None:
        self._registered.append(account)
        account.add_expected_calls(self._expected)
        for holder, (runs, priority) in self._held.items():
            account.hold_back((self, holder), runs, priority)
        for holder, callback in self._relief.items():
            account.on_relief((self, holder), callback)

    def _unregister(self, account: ThreadSafeAccount) -> None:
        self._registered.remove(account)
        account.add_expected_calls(-self._expected)
        for holder in {**self._held, **self._relief}:
            account.forget((self, holder))
