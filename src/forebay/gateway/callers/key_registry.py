"""The issued keys as a running gateway knows them: found by their hashes, read again when their file has changed."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.events import log
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.gateway.callers.caller_limits import CallerLimits, spent_before
from forebay.gateway.callers.issued_keys import IssuedKey, key_digest
from forebay.gateway.callers.key_file import KeySnapshot, read_snapshot, write_last_used
from forebay.spend_log import SpendLog

_POLL_INTERVAL: Final = 1.0  # seconds between two looks at the file: a change is in force within two
_BUSY_TIMEOUT: Final = 0.5  # seconds that a look waits for a command that changes the file
_PATIENCE: Final = 5.0  # seconds for which a file may be locked, or be in the course of being replaced, unreported
_USED_TO: Final = 3600.0  # seconds to which the last use of a key is noted

_Stamp = tuple[tuple[int, int, int, int], ...]
_REFUSALS: Final[Mapping[str, str]] = {
    "revoked": "this API key was revoked: ask for another one",
    "expired": "this API key has expired: ask for another one",
    "disabled": "this API key is disabled: ask who runs this gateway",
}


class KeyRefusal(Exception):
    """The refusal of a key that a caller presents, or of one that is missing.

    Args:
        reason: that the caller may know.
        key_name: of the key; empty if it is none of the file.
    """

    def __init__(self, reason: str, key_name: str = "") -> None:
        super().__init__(reason)
        self.key_name = key_name


class KeyRegistry:
    """The keys of one file, and the limits of those that are in use.

    While the file cannot be read, the keys stay as they were last, and the log says so.

    Args:
        path: the file.
        spend_log: with what it has of their present period the budgets of keys begin; open. None: with nothing.
        ledgers: of the limits of keys, which processes share; None: they are this process's.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, spend_log: SpendLog | None = None, ledgers: CallerLedgers | None = None) -> None:
        self.path = path
        self._spend_log = spend_log
        self._ledgers = ledgers
        self._targets: frozenset[str] | None = None
        self._warned: set[tuple[str, str]] = set()  # keys and targets
        self._files = (os.fspath(path), f"{path}-wal")
        self._snapshot = KeySnapshot(b"", {}, {})
        self._limits: dict[str, CallerLimits] = {}  # by the name of the key
        self._stamp: _Stamp = ()
        self._look_again = False
        self._used: dict[str, float] = {}  # by name: what the file does not have yet
        self._noted: dict[str, float] = {}  # by name: the hour that was noted last
        self._failing_since = math.inf
        self._failure_logged = self._write_failure_logged = False

    def load(self) -> None:
        """Read the file, and block meanwhile.

        Raises:
            StoreUnavailable: it is missing, cannot be read, or is no key file.
        """
        self._stamp = self._read_stamp()
        snapshot = read_snapshot(self.path, timeout=_PATIENCE)
        assert snapshot is not None  # noqa: S101 - it is the first
        self._look_again = True
        self._replace(snapshot)

    async def watch(self) -> None:
        """Read the file again whenever it has changed, and note the last use of keys in it, until cancelled.

        Whatever fails, it goes on: otherwise keys that are revoked later would stay valid.
        """
        failed = False
        while True:
            await asyncio.sleep(_POLL_INTERVAL)
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - logged with its traceback
                if not failed:
                    log.exception("the keys in %s cannot be followed, by a bug; the gateway goes on trying", self.path)
                failed = True
            else:
                failed = False

    async def refresh(self) -> None:
        """Read the file again if it has changed, and note the last use of keys in it."""
        loop = asyncio.get_running_loop()
        try:
            snapshot = await loop.run_in_executor(None, self._read_if_changed, self._snapshot.change)
        except StoreUnavailable as error:
            self._record_failure(error)
        else:
            self._record_success()
            if snapshot is not None:
                self._replace(snapshot)
        used, self._used = self._used, {}
        if used and not await loop.run_in_executor(None, self._write_used, used):
            self._used = {**used, **self._used}

    def find(self, text: str) -> IssuedKey:
        """Return the key whose secret is `text`.

        It is found by its hash, so how long that takes tells nothing about the secrets.

        Raises:
            KeyRefusal: there is none, or it is refused now.
        """
        now = clock.wall_time()
        secret = self._snapshot.secrets.get(key_digest(text))
        key = None if secret is None else self._snapshot.keys.get(secret.key)
        if secret is None or key is None:
            raise KeyRefusal("this API key is not one of this gateway: check that it is complete")
        if (state := key.state(now)) != "active":
            raise KeyRefusal(_REFUSALS[state], key.name)
        if not secret.is_valid(now):
            raise KeyRefusal("this API key was replaced by another one: use that", key.name)
        self._note_use(key.name, now)
        return key

    def limits_of(self, key: IssuedKey) -> CallerLimits:
        """Return the limits of a key, which all its calls share."""
        found = self._limits.get(key.name)
        if found is None:
            key = self._snapshot.keys.get(key.name, key)  # it may have changed while the body of the call arrived
            found = self._limits[key.name] = CallerLimits(
                f"key:{key.name}",
                f"key {key.name!r}",
                quotas=key.quotas(),
                max_concurrent=key.max_concurrent,
                budget=key.budget(),
                spent=spent_before(self._spend_log, "key_budget", key.name),
                ledgers=self._ledgers,
            )
        return found

    def _replace(self, snapshot: KeySnapshot) -> None:
        """Let other keys be in force. What was used of their limits and spent stays used and spent."""
        before, self._snapshot = self._snapshot.keys, snapshot
        self._warn_of_targets()
        for name in list(self._limits):
            key = snapshot.keys.get(name)
            if key is None:
                del self._limits[name]
            elif key != before.get(name):
                self._limits[name].change(quotas=key.quotas(), max_concurrent=key.max_concurrent, budget=key.budget())

    def set_targets(self, targets: Iterable[str]) -> None:
        """Set the names of the gateway's targets: an active key for another one is worth a warning."""
        self._targets = frozenset(targets)
        self._warn_of_targets()

    def _warn_of_targets(self) -> None:
        if self._targets is None:
            return
        named = {(key.name, each) for key in self._snapshot.keys.values() if not key.revoked_at for each in key.targets}
        unknown = {(name, target) for name, target in named if target not in self._targets}
        for name, target in sorted(unknown - self._warned):
            log.warning("the key %r is for the target %r, which this gateway does not have", name, target)
        self._warned = unknown

    def _note_use(self, name: str, now: float) -> None:
        hour = now - now % _USED_TO
        if self._noted.get(name) != hour:
            self._noted[name] = self._used[name] = hour

    # --- the file, in a thread ---

    def _read_if_changed(self, since: bytes) -> KeySnapshot | None:
        """Return the keys if the file has changed since the last look, else None."""
        stamp = self._read_stamp()
        # Once more after a change: the time of a file may be that of a change which was seen and of one after it.
        changed, again = stamp != self._stamp, self._look_again
        if not changed and not again:
            return None
        self._look_again = True  # also after a failure
        snapshot = read_snapshot(self.path, since=since, timeout=_BUSY_TIMEOUT)
        self._stamp, self._look_again = stamp, changed
        return snapshot

    def _read_stamp(self) -> _Stamp:
        """Return what changes when the file is written or replaced."""
        stamps = []
        for name in self._files:
            try:
                found = os.stat(name)  # noqa: PTH116 - a Path takes three times as long
            except OSError:
                stamps.append((0, 0, 0, 0))
            else:
                stamps.append((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size))
        return tuple(stamps)

    def _write_used(self, used: Mapping[str, float]) -> bool:
        """Note the last use of keys in the file; return whether that worked."""
        try:
            write_last_used(self.path, used, timeout=_BUSY_TIMEOUT)
        except StoreUnavailable as error:
            if not self._write_failure_logged:
                log.warning("when keys were used last cannot be noted: %s", error)
            self._write_failure_logged = True
            return False
        self._write_failure_logged = False
        return True

    # --- failures ---

    def _record_failure(self, error: StoreUnavailable) -> None:
        now = clock.now()
        self._failing_since = min(self._failing_since, now)
        if now - self._failing_since >= _PATIENCE and not self._failure_logged:
            self._failure_logged = True
            count = len(self._snapshot.keys)
            log.error("%s Until then the %d keys that are known stay as they are, revoked ones too.", error, count)

    def _record_success(self) -> None:
        if self._failure_logged:
            log.warning("the keys in %s can be read again", self.path)
        self._failing_since, self._failure_logged = math.inf, False
