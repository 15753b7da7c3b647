"""The durability that a URL asks for of a write on Redis: so many replicas have it, or the disks do."""

from __future__ import annotations

from typing import Any

from forebay.errors import StoreUnavailable
from forebay.storage.redis_url import RedisUrl


def wait_command(url: RedisUrl, *, timeout_ms: int, disks_timeout_ms: int, on_disks: bool = True) -> tuple[Any, ...]:
    """Return the command that waits until the writes before it are as durable as the URL asks for.

    They are those of the same connection: what is repeated on a new one has to write something, else there is nothing
    to wait for. It is empty if the URL asks for nothing.

    Args:
        url: what is asked for.
        timeout_ms: how long replicas may take.
        disks_timeout_ms: how long they and the disks may take.
        on_disks: False for writes that need no disk, whatever the URL asks for.
    """
    if url.fsync and on_disks:
        return ("WAITAOF", 1, url.replicas, disks_timeout_ms)
    return ("WAIT", url.replicas, timeout_ms) if url.replicas else ()


def write_shortage(
    url: RedisUrl, command: tuple[Any, ...], had: Any, *, kind: type[StoreUnavailable] = StoreUnavailable
) -> StoreUnavailable | None:
    """Return the error of writes that are on too few replicas and disks; None if they are on enough of them.

    Args:
        url: what is asked for.
        command: the one that has waited.
        had: its answer.
        kind: of the error.
    """
    name, *_, timeout = command
    local, replicas = had if name == "WAITAOF" else (1, had)
    if local and replicas >= url.replicas:
        return None
    of = "disks of replicas" if name == "WAITAOF" else "replicas"
    why = f"only {replicas} of {url.replicas} {of} had the write within {timeout} ms"
    if not local:
        why = f"its own disk did not have the write within {timeout} ms"
    advice = "Look after the replicas and disks, or ask for less in the URL: ?replicas= and fsync="
    return kind(where=str(url), why=why, advice=advice)
