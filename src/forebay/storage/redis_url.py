"""The URL of a Redis master: named, or found by Sentinels or the nodes of a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import SplitResult, unquote

from forebay.storage.shown_url import shown_value

REDIS_FORM = (
    "redis://user:password@host:6379/0, redis+sentinel://host:26379,host:26379/service/0,"
    " redis+cluster://host:6379,host:6379 (rediss for TLS; ?name=, replicas=, fsync=yes)"
)

_DEFAULT_NAME = "forebay"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # part of every key, within the braces of the hash tag
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")
_LOGIN_OPTIONS = frozenset({"user", "username", "password", "pass", "passwd", "auth"})
_MAX_DATABASE = 10_000
_MAX_REPLICAS = 100


class RedisTopology(Enum):
    """The way to find the Redis master: it is named, or Sentinels or the nodes of a cluster are asked."""

    SINGLE = "redis"
    SENTINEL = "redis+sentinel"
    CLUSTER = "redis+cluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """A Redis master as a user named it. Its text is the URL without user and password.

    Attributes:
        topology: how it is found.
        hosts: host and port of the master, the Sentinels or some nodes of the cluster.
        service: the name under which the Sentinels know it; empty without Sentinels.
        database: its number; a cluster has only 0.
        username: for the master, or None.
        password: for the master, or None.
        tls: whether the connection is encrypted, and the certificate verified.
        name: the overflow's name there; several can share a master.
        replicas: how many must have a write before it is acknowledged.
        fsync: whether the master's disk must have a write before it is acknowledged.
    """

    topology: RedisTopology
    hosts: tuple[tuple[str, int], ...]
    service: str = ""
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    name: str = _DEFAULT_NAME
    replicas: int = 0
    fsync: bool = False

    def __str__(self) -> str:
        scheme = self.topology.value.replace("redis", "rediss") if self.tls else self.topology.value
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        path = "" if self.topology is RedisTopology.CLUSTER else f"/{self.database}"
        return f"{scheme}://{hosts}{self.service and '/'}{self.service}{path}"


def parse_redis_url(parts: SplitResult, options: dict[str, str]) -> RedisUrl:
    """Return the master that a URL names, and remove the options that it has from `options`.

    Raises:
        ValueError: the URL names none; the message says why.
    """
    topology = RedisTopology(parts.scheme.replace("rediss", "redis"))
    if not parts.netloc:
        raise ValueError(f"it names no host: write {parts.scheme}://user:password@host:port, with two slashes")
    if options.keys() & _LOGIN_OPTIONS:
        raise ValueError(f"a user and a password are before the host: {parts.scheme}://user:password@host:port")
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("a '/', '?' or '#' in a password is written %2F, %3F or %23")
    if parts.fragment:
        raise ValueError("it has a '#', which no part of it may have")
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    service, database = _path(topology, unquote(parts.path.removeprefix("/")))
    return RedisUrl(
        topology=topology,
        hosts=_hosts(hosts, 26379 if topology is RedisTopology.SENTINEL else 6379),
        service=service,
        database=database,
        username=unquote(username) or None,
        password=unquote(password) or None,
        tls=parts.scheme.startswith("rediss"),
        name=_overflow_name(options),
        replicas=_replicas(options),
        fsync=_fsync(options),
    )


def _hosts(text: str, default_port: int) -> tuple[tuple[str, int], ...]:
    hosts = []
    for each in text.split(","):
        found = _HOST.fullmatch(each)
        if found is None:
            raise ValueError("it names no host: after :// there are host:port, and more of them after a comma")
        port = int(found["port"] or default_port)
        if not 0 < port < 1 << 16:
            raise ValueError(f"there is no port {port}")
        hosts.append((found["v6"] or found["host"], port))
    return tuple(hosts)


def _path(topology: RedisTopology, path: str) -> tuple[str, int]:
    """Return the name of the Sentinels' service, and the number of the database."""
    service = ""
    if topology is RedisTopology.SENTINEL:
        service, _, path = path.partition("/")
        if not service:
            raise ValueError("after the Sentinels, it names no service: redis+sentinel://host:port/service/0")
    if path and not (path.isdecimal() and path.isascii() and int(path) <= _MAX_DATABASE):
        raise ValueError("after the hosts there is the number of a database, by default 0")
    if topology is RedisTopology.CLUSTER and int(path or 0):
        raise ValueError("a cluster has no database but 0")
    return service, int(path or 0)


def _overflow_name(options: dict[str, str]) -> str:
    name = options.pop("name", _DEFAULT_NAME)
    if not _NAME.fullmatch(name):
        raise ValueError("name= is not 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def _replicas(options: dict[str, str]) -> int:
    text = options.pop("replicas", "0")
    if not (text.isdecimal() and text.isascii() and int(text) <= _MAX_REPLICAS):
        raise ValueError(f"replicas={shown_value(text)} is not a number of replicas, 0 to {_MAX_REPLICAS}")
    return int(text)


def _fsync(options: dict[str, str]) -> bool:
    text = options.pop("fsync", "no")
    if text not in {"yes", "no"}:
        raise ValueError(f"fsync={shown_value(text)} is neither yes nor no")
    return text == "yes"


REDIS_SCHEMES = tuple(
    topology.value.replace("redis", scheme) for topology in RedisTopology for scheme in ("redis", "rediss")
)
