"""Leader election by a lease, so that of several autoscalers of one target a single one acts."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from typing import Any, Final, Protocol, Self

import msgspec

from forebay import clock
from forebay._cancellation import raise_own_cancellation
from forebay._validate import check_name, check_positive, is_positive, reject
from forebay.errors import Conflict
from forebay.events import log

_OWNER: Final = "LeaderLease"
_LEAD_SHARE: Final = 2 / 3  # of the duration: for so long a leader acts; the rest is for calls under way, and clocks
_RENEW_SHARE: Final = 2 / 15  # of the duration, between two looks at the lease; as Kubernetes's own leaders
_MAX_DURATION: Final = 3600.0
_NOBODY: Final = ""
_KEY: Final = "leader"


def check_duration(owner: str, duration: object) -> None:
    """Check the duration of a lease.

    Raises:
        InvalidSetting: it is no number of seconds above 0, or more than an hour.
    """
    check_positive(owner, "duration", duration, unit="seconds")
    if not (is_positive(duration) and duration <= _MAX_DURATION):
        reject(owner, "duration", duration, f"at most {_MAX_DURATION:g} seconds: so long nobody follows a leader")


class LeaseRecord(msgspec.Struct, frozen=True):
    """A lease as it is stored.

    Attributes:
        holder: who leads; empty if the last leader has given it back.
        duration: seconds after the last change for which nobody else may take it.
        version: differs after each change.
    """

    holder: str
    duration: float
    version: Any


class LeaseStore(Protocol):
    """The place of a lease that several processes see: it is written only if it has not changed since it was read."""

    @property
    def name(self) -> str:
        """The name of the lease, in messages."""

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """Disconnect."""

    async def read(self) -> LeaseRecord | None:
        """Return the lease; None if it was never taken."""

    async def write(self, holder: str, duration: float, *, after: LeaseRecord | None) -> LeaseRecord | None:
        """Replace the lease that was read, and return the new one; None if another process has changed it since."""


class LeaderLease:
    """A share in a lease that at most one process holds at a time. An async context manager.

    The holder renews it, and leads for two thirds of its duration after each renewal was *begun*. The others take it
    over when they have seen no change for the whole duration, by their own clocks: those of two machines need not show
    the same time. So a leader that is paused, or cut off, has stopped leading before another begins.

    Args:
        store: where the lease is, such as `forebay.scale.KubernetesLease`.
        holder: begins the name of this process; None for its host and process id. A random part follows, because two
            processes with one configuration must not take each other's lease for their own.
        duration: seconds after which the lease of a leader that is gone is taken over.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(self, store: LeaseStore, *, holder: str | None = None, duration: float = 15.0) -> None:
        if holder is not None:
            check_name(_OWNER, "holder", holder)
        check_duration(_OWNER, duration)
        self.holder = f"{holder or f'{socket.gethostname()}-{os.getpid()}'}-{clock.new_id()[-8:]}"
        self._store = store
        self._duration = duration
        self._leads_until = -math.inf
        self._seen: LeaseRecord | None = None
        self._seen_at = -math.inf
        self._renewing: asyncio.Task[None] | None = None
        self._failing = False
        self._follows = _NOBODY  # who was seen to lead
        self._change = asyncio.Event()  # set when the lead is taken

    @property
    def leads_until(self) -> float:
        """Loop time until which this process leads; in the past if it does not."""
        return self._leads_until

    async def open(self) -> None:
        """Connect, look at the lease, and take it if it is free; go on doing so.

        Raises:
            Others: what the store raises; nothing remains open.
        """
        try:
            await self._store.open()
            await self._look()
        except BaseException:
            await self._store.close()
            raise
        self._renewing = asyncio.ensure_future(self._renew())

    async def close(self) -> None:
        """Stop leading, and give the lease back, so that another process need not wait."""
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait((renewing,))
        led, self._leads_until = self._leads_until > _now(), -math.inf
        try:
            if led:
                async with asyncio.timeout(self._duration):
                    await self._store.write(_NOBODY, self._duration, after=self._seen)
        except Exception as error:  # noqa: BLE001 - then it runs out
            log.warning("the lease %s was not given back (%s: %s)", self._store.name, type(error).__name__, error)
        finally:
            await self._store.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def wait(self) -> None:
        """Return when this process leads."""
        while self._leads_until <= _now():
            self._change.clear()
            await self._change.wait()

    # --- renewing ---

    async def _renew(self) -> None:
        period = _RENEW_SHARE * self._duration
        while True:
            await asyncio.sleep(period * (0.8 + 0.4 * clock.draw()))  # spread, so that they do not meet again and again
            try:
                async with asyncio.timeout(_LEAD_SHARE * self._duration):
                    await self._look()
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the store is away: what is led ends by itself
                raise_own_cancellation(error)
                if not self._failing:
                    log.warning(
                        "the lease %s cannot be renewed (%s: %s)", self._store.name, type(error).__name__, error
                    )
                self._failing = True
            else:
                self._failing = False

    async def _look(self) -> None:
        """Read the lease, and take or renew it if that is allowed."""
        begun = _now()
        found = await self._store.read()
        if found != self._seen:
            self._seen, self._seen_at = found, _now()
        if found is not None and not self._may_take(found):
            if found.holder != self._follows:
                log.info("%s is held by %s: this process waits (%s)", self._store.name, found.holder, self.holder)
            self._follows = found.holder
            self._lead_until(-math.inf)
            return
        written = await self._store.write(self.holder, self._duration, after=found)
        if written is None:  # another one was faster; if the answer to a write of our own was lost, it is seen as ours
            self._lead_until(-math.inf)
            return
        self._seen, self._seen_at, self._follows = written, _now(), _NOBODY
        self._lead_until(begun + _LEAD_SHARE * self._duration)

    def _may_take(self, found: LeaseRecord) -> bool:
        return found.holder in (self.holder, _NOBODY) or _now() >= self._seen_at + found.duration

    def _lead_until(self, until: float) -> None:
        now = _now()
        if (led := self._leads_until > now) != (leads := until > now):
            log.info(
                "%s %s: %s", self._store.name, "is held by this process" if leads else "is held no longer", self.holder
            )
        self._leads_until = until
        if leads and not led:
            self._change.set()


class SharedState(Protocol):
    """A namespace of `forebay.state.ShardedState`, as far as a lease needs it."""

    async def get(self, key: str) -> Any:
        """Return the value of a key with its version, or None."""

    async def put(self, key: str, value: Any, ttl: float | None = None, if_version: int | None = None) -> int:
        """Write a value if the key has a version; return the new one."""


class StateLease:
    """A lease in the state that the processes share.

    Args:
        state: a namespace of a `forebay.state.ShardedState`, of this lease alone, that its owner opens and closes.
        name: of the lease, in messages.
    """

    def __init__(self, state: SharedState, name: str = "autoscaler") -> None:
        self.name = name
        self._state = state

    async def open(self) -> None:
        """Do nothing: the state is open."""

    async def close(self) -> None:
        """Do nothing: the state has an owner."""

    async def read(self) -> LeaseRecord | None:
        """Return the lease; None if it was never taken.

        Raises:
            ShardUnavailable: its shard is down.
        """
        found = await self._state.get(_KEY)
        if found is None:
            return None
        return LeaseRecord(str(found.value["holder"]), float(found.value["duration"]), found.version)

    async def write(self, holder: str, duration: float, *, after: LeaseRecord | None) -> LeaseRecord | None:
        """Replace the lease that was read, and return the new one; None if another process has changed it since.

        Raises:
            ShardUnavailable: its shard is down.
        """
        try:
            version = await self._state.put(
                _KEY, {"holder": holder, "duration": duration}, if_version=0 if after is None else after.version
            )
        except Conflict:
            return None
        return LeaseRecord(holder, duration, version)


def _now() -> float:
    return asyncio.get_running_loop().time()
