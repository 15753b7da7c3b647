"""Ledgers on Redis: processes on any machines share them. `redis_exchange.lua` decides: one run of it is one exchange.

A master that fails over may lose its last writes; members report what they hold and know at their next exchange.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Final

import msgspec

from forebay.storage.redis_durability import wait_command, write_shortage
from forebay.storage.redis_master import RedisMaster
from forebay.storage.redis_url import RedisUrl
from forebay.upstream.shared.ledger.ledger import UnreadableLedger
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest

_SCRIPT: Final = files(__package__).joinpath("redis_exchange.lua").read_text()
_SHA: Final = hashlib.sha1(_SCRIPT.encode()).hexdigest()  # noqa: S324 - the name that Redis gives it
_PATIENCE: Final = 1.0  # seconds in which a master is looked for: well below a lease
_REPLICAS_TIMEOUT_MS: Final = 1_000
_DISKS_TIMEOUT_MS: Final = 4_000

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(ExchangeReply).decode


class RedisLedgerStore:
    """A store of ledgers on a Redis master, which is named or found by Sentinels or a cluster's nodes.

    Args:
        url: where the master is, the name of the ledgers there, and what an exchange that was answered survives.

    Attributes:
        where: see `LedgerStore`.
    """

    def __init__(self, url: RedisUrl) -> None:
        self.where = str(url)
        self._url = url
        self._prefix = f"{{{url.name}}}:ledger:"
        self._wait = wait_command(url, timeout_ms=_REPLICAS_TIMEOUT_MS, disks_timeout_ms=_DISKS_TIMEOUT_MS)
        self._master = self._new_master()

    def _new_master(self) -> RedisMaster:
        load = [("SCRIPT", "LOAD", _SCRIPT)]
        return RedisMaster(self._url, self._url.name, prepare=load, patience=_PATIENCE)

    def exchange(self, requests: Sequence[ExchangeRequest]) -> Sequence[ExchangeReply]:
        """See `LedgerStore`. All exchanges are one round trip."""
        commands = [("EVALSHA", _SHA, 1, self._prefix + each.ledger, _encode(each)) for each in requests]
        if self._wait:
            commands.append(self._wait)
        answers = self._master.call(*commands)
        if self._wait:
            shortage = write_shortage(self._url, self._wait, answers.pop())
            if shortage is not None:
                raise shortage
        try:
            return [_decode(answer) for answer in answers]
        except msgspec.DecodeError as error:
            layouts = [msgspec.msgpack.decode(answer).get("layout") for answer in answers]
            newest = max((layout for layout in layouts if layout), default=None)
            raise UnreadableLedger(newest).unavailable(self.where) from error

    def close(self) -> None:
        """See `LedgerStore`."""
        self._master.close()

    def reset_after_fork(self) -> None:
        """See `LedgerStore`. redis-py leaves a parent's connections alone in a child."""
        self._master = self._new_master()
