"""A connection to the Redis master that holds the keys of one hash tag, found again when it moves or restarts.

A master that is named, that Sentinels know, or that has the tag's slot in a cluster differ only in how it is found.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import redis
import redis.exceptions
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.retry import Retry

from forebay.clock import monotonic
from forebay.errors import StoreAnswerLost, StoreUnavailable
from forebay.storage.redis_url import RedisTopology, RedisUrl

_NOTHING_DROPPED = "noeviction"
_MIN_VERSION = (7, 0)
_MIN_VERSION_FOR_FSYNC = (7, 2)  # WAITAOF

_CONNECT_TIMEOUT = 1.0  # seconds
_ANSWER_TIMEOUT = 2.0  # seconds: more than the master waits for its replicas
_DISKS_TIMEOUT = 3.0  # seconds more, if it waits for its disk
_PATIENCE = 5.0  # seconds in which a master is looked for
_CHECK_INTERVAL = 15  # seconds after which an idle connection is checked before it is used, or while it listens
_RETRY_INTERVAL = 0.1  # seconds between two attempts
_INTERRUPTION = 0.5  # seconds of repeating a call after which the master was away: an idle connection may just end

FULL = ("its memory is full", "Raise its maxmemory, or wait until tasks have ended.")  # why, and what to do

# By the class of the error, or the code of the answer: why the master cannot be used, and what to do.
_ADVICE = {
    "AuthenticationError": ("it rejected the user or the password", "Correct them in the URL: redis://user:pass@host"),
    "NoPermissionError": ("the user lacks the right to a command", "Grant it; the guide to the overflow has a list."),
    "OutOfMemoryError": FULL,
    "ReadOnlyError": ("it is a replica", "Name the master, or let Sentinels find it: redis+sentinel://"),
    "MovedError": ("it is a node of a cluster that has other keys", "Let the nodes tell: redis+cluster://"),
    "MISCONF": ("it cannot write to its disk, and so accepts nothing", "Free space on the disk of the Redis server."),
    "NOREPLICAS": ("it has too few replicas, and so accepts nothing", "Start its replicas."),
    "WRONGTYPE": ("another program has a key of Forebay's", "Choose another ?name= or another database."),
}

# What the next attempt, perhaps with another master, may not meet.
_PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,
    redis.exceptions.MovedError,
    redis.exceptions.AskError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.NoScriptError,
)
_PASSING_CODES = ("UNBLOCKED", "BUSY")
_LASTING = (redis.AuthenticationError, redis.exceptions.AuthorizationError)  # although they are ConnectionErrors


class RedisMaster:
    """A connection to one master. What it is sent must be safe to repeat: an answer may be lost with the connection.

    It blocks, and may be used by any thread, one at a time.

    Args:
        url: where to find the master.
        tag: the hash tag that all keys have in braces.
        prepare: commands for each new connection, such as SCRIPT LOAD.
        on_interrupted: called, in the thread of a call and before it returns, when its master has answered after it was
            away for a while or gave no answer to the last call, or is another one than before.
        patience: seconds in which it is looked for once a call has found none; None: five.
    """

    def __init__(
        self,
        url: RedisUrl,
        tag: str,
        *,
        prepare: Sequence[Sequence[Any]] = (),
        on_interrupted: Callable[[], None] | None = None,
        patience: float | None = None,
    ) -> None:
        self._url = url
        self._tag = tag
        self._prepare = prepare
        self._on_interrupted = on_interrupted
        self._patience = patience
        self._client: redis.Redis | None = None
        self._server = ""  # the id of its server's run; empty before the first, or if the user may not ask
        self._lock = threading.Lock()  # held by the thread that uses the client
        self._is_away = False  # the last call found no master: one attempt is enough until it is back

    def call(self, *commands: Sequence[Any]) -> list[Any]:
        """Send `commands` together, and return the answers to all of them, of the same master.

        Raises:
            StoreUnavailable: no master answered in time, or it rejected a command.
            StoreAnswerLost: one may have done them, or do them yet.
        """
        return self._call(commands, _send)

    def call_each(self, *commands: Sequence[Any]) -> list[Any]:
        """Do as `call` does; but the answer to a command that is rejected is a StoreUnavailable, which is not raised.

        All commands are sent again while one of them is rejected for what may pass.

        Raises:
            StoreUnavailable, StoreAnswerLost: as `call`, of all commands.
        """
        latest = list[Any]()

        def send(client: redis.Redis, commands: Sequence[Sequence[Any]]) -> list[Any]:
            latest[:] = _send_each(client, commands)
            for answer in latest:
                if isinstance(answer, Exception) and may_pass(answer):
                    raise answer
            return latest

        try:
            answers = self._call(commands, send)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, redis.ResponseError) or len(latest) < len(commands):
                raise
            answers = latest
        return [_caused(each, self._url) if isinstance(each, Exception) else each for each in answers]

    def _call(
        self, commands: Sequence[Sequence[Any]], send: Callable[[redis.Redis, Sequence[Sequence[Any]]], list[Any]]
    ) -> list[Any]:
        with self._lock:
            began, was_away, server = monotonic(), self._is_away, self._server
            patience = _PATIENCE if self._patience is None else self._patience
            give_up = began + (0.0 if was_away else patience)
            may_be_done = failed = False
            while True:
                try:
                    if self._client is None:
                        self._client, self._server = _connect(self._url, self._tag, self._prepare)
                    answers = send(self._client, commands)
                except (redis.RedisError, OSError) as error:
                    # Of an answer it is known what was done; a connection that never was had no command.
                    may_be_done |= self._client is not None and not isinstance(error, redis.ResponseError)
                    self._disconnect()
                    failed = True
                    self._is_away = may_pass(error)
                    if not self._is_away or monotonic() >= give_up:
                        raise unavailable(error, self._url, may_be_done=may_be_done) from error
                    threading.Event().wait(_RETRY_INTERVAL)
                else:
                    self._is_away = False
                    waited = failed and monotonic() - began > _INTERRUPTION
                    if was_away or waited or (server and self._server != server):
                        self._notice_interruption()
                    return answers

    @property
    def address(self) -> tuple[str, int] | None:
        """The host and port of the master that has answered last; None: there is no connection."""
        client = self._client  # another thread may disconnect
        return None if client is None else address_of(client)

    def time(self) -> float | None:
        """Return the epoch seconds of the master's clock; None if it does not tell, or not this user.

        Raises:
            StoreUnavailable: no master answered in time.
        """
        try:
            (info,) = self.call(("INFO", "server"))  # TIME is another right
        except StoreUnavailable as error:
            cause = error.__cause__
            if not isinstance(cause, redis.ResponseError) or may_pass(cause):
                raise
            return None
        microseconds = info.get("server_time_usec")
        return None if microseconds is None else int(microseconds) / 1e6

    def close(self) -> None:
        """Disconnect. The next call connects again."""
        with self._lock:
            self._disconnect()

    def _notice_interruption(self) -> None:
        if self._on_interrupted is not None:
            self._on_interrupted()

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def connect(url: RedisUrl, tag: str) -> redis.Redis:
    """Return a client of the first master that is found for `tag` and answers as one. Blocks.

    Raises:
        StoreUnavailable: it may drop records to make room.
        RedisError, OSError: none is found.
    """
    client, _ = _connect(url, tag, ())
    return client


def _connect(url: RedisUrl, tag: str, prepare: Sequence[Sequence[Any]]) -> tuple[redis.Redis, str]:
    """Return a client as `connect` does, to which `prepare` was sent, and the id of the server's run."""
    last: Exception = redis.ConnectionError("nobody names a master")
    for host, port in _FINDERS[url.topology](url, tag):
        client = _client(url, host, port)
        try:
            info = _info(client)
            _check(info, url)
            _send(client, prepare)
        except (redis.RedisError, OSError) as error:
            client.close()
            last = error
        except BaseException:
            client.close()
            raise
        else:
            return client, str(info.get("run_id", ""))
    raise last


def address_of(client: redis.Redis) -> tuple[str, int]:
    """Return the host and port that a client is connected to."""
    settings = client.connection_pool.connection_kwargs
    return str(settings["host"]), int(settings["port"])


def _check(info: Mapping[str, Any], url: RedisUrl) -> None:
    """Check what a server says about itself.

    Raises:
        StoreUnavailable: it is too old, may drop records to make room, or has no file to write to as the URL asks.
        ReadOnlyError: it is a replica.
    """
    if info.get("role", "master") != "master":
        raise redis.ReadOnlyError("it is a replica")
    version = tuple(map(int, str(info.get("redis_version", "8.0")).split(".")[:2]))
    needed = _MIN_VERSION_FOR_FSYNC if url.fsync else _MIN_VERSION
    if version < needed:
        why = "it is Redis {}.{}, and {}.{} is needed{}".format(
            *version, *needed, " for fsync=yes" if url.fsync else ""
        )
        raise StoreUnavailable(where=str(url), why=why, advice="Use a newer server.")
    policy = str(info.get("maxmemory_policy", _NOTHING_DROPPED))
    # With volatile-* it keeps the records, and drops the memory of which calls it has done.
    if int(info.get("maxmemory", 0)) and policy != _NOTHING_DROPPED:
        why = f"it drops keys when its memory is full (maxmemory-policy {policy}): tasks would be lost, or done twice"
        advice = "Set maxmemory-policy noeviction, or use another Redis server."
        raise StoreUnavailable(where=str(url), why=why, advice=advice)
    if url.fsync and not int(info.get("aof_enabled", 1)):
        why = "it writes no append-only file, which fsync=yes waits for"
        raise StoreUnavailable(where=str(url), why=why, advice="Set appendonly yes, or leave fsync=yes out of the URL.")


def unavailable(error: BaseException, url: RedisUrl, *, may_be_done: bool = False) -> StoreUnavailable:
    """Return the error to raise for what Redis has answered, or for an answer that did not come.

    Args:
        error: what the client has raised.
        url: where the master is.
        may_be_done: whether it was sent something whose answer did not come.
    """
    text = str(error)
    known = _ADVICE.get(type(error).__name__) or _ADVICE.get(text.partition(" ")[0]) or _known_by_text(text, url)
    why, advice = known or (
        _plain(error, url),
        "Check that the Redis server runs and can be reached; look into its log.",
    )
    kind = StoreAnswerLost if may_be_done else StoreUnavailable
    return kind(where=str(url), why=why, advice=advice)


def _caused(error: Exception, url: RedisUrl) -> StoreUnavailable:
    """Return the error to raise, with what the client has raised as its cause."""
    result = unavailable(error, url)
    result.__cause__ = error
    return result


def _known_by_text(text: str, url: RedisUrl) -> tuple[str, str] | None:
    if text.startswith("DB index is out of range"):
        return f"it has no database {url.database}", "Name a lower one in the URL, or raise `databases` of the server."
    is_unknown = text.startswith(("unknown command", "ERR unknown command"))
    if url.topology is RedisTopology.SENTINEL and is_unknown:
        return (
            "what it names is no Sentinel",
            f"Name the Sentinels, or write {_plain_scheme(url)}:// for a server itself.",
        )
    if url.topology is RedisTopology.CLUSTER and "cluster support disabled" in text.lower():
        return "what it names is not in a cluster", f"Write {_plain_scheme(url)}:// for a server that is in none."
    return None


def _plain_scheme(url: RedisUrl) -> str:
    return "rediss" if url.tls else "redis"


def _plain(error: BaseException, url: RedisUrl) -> str:
    """Return what a system error means, without the words of the client and its place, which the message has."""
    cause: BaseException | None = error
    late = "it did not answer in time" + (": is that its port for TLS?" if url.tls else "")
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return late
        if isinstance(cause, ssl.SSLError):
            return f"the TLS connection failed ({cause.reason or cause}): is that its port for TLS?"
        if isinstance(cause, OSError) and cause.strerror:
            return f"it cannot be reached ({cause.strerror.lower()})"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, redis.TimeoutError):
        return late
    if isinstance(error, redis.exceptions.InvalidResponse):
        return "what answers there is no Redis server"
    return str(error).rstrip(".") or type(error).__name__


def may_pass(error: BaseException | None) -> bool:
    """Return whether another attempt, perhaps with another master, may succeed."""
    if isinstance(error, _LASTING):
        return False
    return isinstance(error, (*_PASSING, OSError)) or str(error).startswith(_PASSING_CODES)


def _send(client: redis.Redis, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """Send `commands` in one round trip, and return the answers; if one is an error, raise it."""
    answers = _send_each(client, commands)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _send_each(client: redis.Redis, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """Send `commands` in one round trip, and return the answers, some of which may be errors."""
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    try:  # by hand: a pipeline of the client does the same in twice the time
        connection.send_packed_command(connection.pack_commands(commands))
        return [_answer(client, connection, command) for command in commands]
    except BaseException:
        connection.disconnect()  # no later command may read the answer to this one
        raise
    finally:
        pool.release(connection)


def _answer(client: redis.Redis, connection: Any, command: Sequence[Any]) -> Any:
    try:
        return client.parse_response(connection, command[0])  # type: ignore[no-untyped-call]
    except redis.ResponseError as error:
        return error


def _info(client: redis.Redis) -> Mapping[str, Any]:
    """Return what a server says about itself: nothing, if the user may not ask for it."""
    try:
        (info,) = _send(client, [("INFO",)])
    except redis.ResponseError as error:
        if may_pass(error):
            raise
        return {}
    return info  # type: ignore[no-any-return]


def _client(url: RedisUrl, host: str, port: int) -> redis.Redis:
    return _plain_client(url, host, port, db=url.database, username=url.username, password=url.password)


def _plain_client(url: RedisUrl, host: str, port: int, **login: Any) -> redis.Redis:
    return redis.Redis(
        host=host,
        port=port,
        ssl=url.tls,
        socket_timeout=_ANSWER_TIMEOUT + (_DISKS_TIMEOUT if url.fsync else 0.0),
        socket_connect_timeout=_CONNECT_TIMEOUT,
        socket_keepalive=True,
        health_check_interval=_CHECK_INTERVAL,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        **login,
    )


def _named(url: RedisUrl, tag: str) -> Iterator[tuple[str, int]]:  # noqa: ARG001 - one master has all tags
    yield from url.hosts


def _known_to_sentinels(url: RedisUrl, tag: str) -> Iterator[tuple[str, int]]:  # noqa: ARG001 - one master has all tags
    """Yield the master that each Sentinel names. A Sentinel may have no password, and then rejects any."""
    logins: list[dict[str, Any]] = [{}, {"username": url.username, "password": url.password}]
    for _, answer in _ask_each(url, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.service), logins):
        if answer:
            yield answer[0].decode(), int(answer[1])


def _with_slot(url: RedisUrl, tag: str) -> Iterator[tuple[str, int]]:
    """Yield the master that each node of a cluster names for the slot of `tag`."""
    slot = key_slot(f"{{{tag}}}".encode())
    for masters in _slots_by_nodes(url):
        for first, last, address in masters:
            if first <= slot <= last:
                yield address


def _slots_by_nodes(url: RedisUrl) -> Iterator[Sequence[tuple[int, int, tuple[str, int]]]]:
    """Yield, for each node that answers, the first and the last slot of each master by its word, and its address."""
    for asked, answer in _ask_each(url, ("CLUSTER", "SLOTS"), [{"username": url.username, "password": url.password}]):
        yield [
            (first, last, (asked if host in {None, b"", b"?"} else host.decode(), int(port)))
            for first, last, (host, port, *_), *_ in answer
        ]


def masters_of_slots(url: RedisUrl) -> list[RedisUrl]:
    """Return the URL of the node of each slot of a cluster. Blocks.

    Raises:
        StoreUnavailable: no node answers, or none knows a master for each slot.
    """
    try:
        for masters in _slots_by_nodes(url):
            by_slot = {slot: address for first, last, address in masters for slot in range(first, last + 1)}
            if len(by_slot) == REDIS_CLUSTER_HASH_SLOTS:
                named = {each: replace(url, topology=RedisTopology.SINGLE, hosts=(each,)) for each in by_slot.values()}
                return [named[by_slot[slot]] for slot in range(REDIS_CLUSTER_HASH_SLOTS)]
    except (redis.RedisError, OSError) as error:
        raise unavailable(error, url) from error
    why, advice = "some of its slots have no master", "Look after its nodes: redis-cli --cluster check HOST:PORT"
    raise StoreUnavailable(where=str(url), why=why, advice=advice)


def _ask_each(url: RedisUrl, command: Sequence[str], logins: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the hosts that answer `command`, by one of `logins`, with their answers; if none does, raise an error."""
    last: Exception | None = None
    answered = False
    for host, port in url.hosts:
        for login in logins:
            with closing(_plain_client(url, host, port, **login)) as client:
                try:
                    (answer,) = _send(client, [command])
                except redis.AuthenticationError as error:
                    last = error
                    continue
                except (redis.RedisError, OSError) as error:
                    last = error
                    break
            answered = True
            yield host, answer
            break
    if last is not None and not answered:
        raise last


_FINDERS: Mapping[RedisTopology, Callable[[RedisUrl, str], Iterator[tuple[str, int]]]] = {
    RedisTopology.SINGLE: _named,
    RedisTopology.SENTINEL: _known_to_sentinels,
    RedisTopology.CLUSTER: _with_slot,
}
