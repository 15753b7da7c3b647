"""The URL of a Redis master: each known form is parsed, anything else is rejected with the reason."""

from __future__ import annotations

import pytest

from forebay.errors import InvalidOverflowUrl
from forebay.storage import parse_url
from forebay.storage.redis_url import RedisTopology, RedisUrl

SINGLE, SENTINEL, CLUSTER = RedisTopology.SINGLE, RedisTopology.SENTINEL, RedisTopology.CLUSTER


@pytest.mark.parametrize(
    ("url", "redis"),
    [
        ("redis://host", RedisUrl(topology=SINGLE, hosts=(("host", 6379),))),
        ("redis://host/", RedisUrl(topology=SINGLE, hosts=(("host", 6379),))),
        ("redis://10.0.0.1:7000/3", RedisUrl(topology=SINGLE, hosts=(("10.0.0.1", 7000),), database=3)),
        ("redis://[::1]:7000", RedisUrl(topology=SINGLE, hosts=(("::1", 7000),))),
        ("rediss://host", RedisUrl(topology=SINGLE, hosts=(("host", 6379),), tls=True)),
        (
            "redis://us%3Aer:p%40ss%2F@host",
            RedisUrl(topology=SINGLE, hosts=(("host", 6379),), username="us:er", password="p@ss/"),
        ),
        ("redis://:secret@host", RedisUrl(topology=SINGLE, hosts=(("host", 6379),), password="secret")),
        (
            "redis://host?name=mails.v2&replicas=2&fsync=yes",
            RedisUrl(topology=SINGLE, hosts=(("host", 6379),), name="mails.v2", replicas=2, fsync=True),
        ),
        (
            "redis+sentinel://a,b:7000/mymaster/2",
            RedisUrl(topology=SENTINEL, hosts=(("a", 26379), ("b", 7000)), service="mymaster", database=2),
        ),
        (
            "rediss+cluster://u:p@a:1,b",
            RedisUrl(topology=CLUSTER, hosts=(("a", 1), ("b", 6379)), username="u", password="p", tls=True),
        ),
    ],
)
def test_a_known_form_is_parsed(url: str, redis: RedisUrl) -> None:
    assert parse_url(url).redis == redis


def test_a_url_of_redis_may_have_a_bound() -> None:
    store = parse_url("redis://host?bound=7&name=x")
    assert store.bound == 7
    assert store.redis is not None
    assert store.redis.name == "x"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        ("redis://a,,b", "names no host"),
        ("redis://a b", "names no host"),
        ("redis://host:0", "no port 0"),
        ("redis://host:65536", "no port 65536"),
        ("redis://host:x", "names no host"),
        ("redis://host/x", "number of a database"),
        ("redis://host/-1", "number of a database"),
        ("redis://host/0/1", "number of a database"),
        ("redis://host/99999999999", "number of a database"),
        ("redis://host#x", "'#'"),
        ("redis+cluster://host/1", "no database but 0"),
        ("redis+sentinel://host", "names no service"),
        ("redis+sentinel://host/", "names no service"),
        ("redis+sentinel://host/service/x", "number of a database"),
        ("redis+http://host", "no store 'redis+http'"),
        ("redis://host?name=", "name= is not"),
        ("redis://host?name={x}", "name= is not"),
        ("redis://host?name=" + "x" * 65, "name= is not"),
        ("redis://host?replicas=-1", "replicas=-1"),
        ("redis://host?replicas=101", "replicas=101"),
        ("redis://host?replicas=two", "replicas=two"),
        ("redis://host?fsync=true", "fsync=true"),
        ("redis://host?synchronous=off", "no option 'synchronous'"),
        ("redis://host?fsync=checkpoint", "fsync=checkpoint is neither yes nor no"),
        ("redis://host?bound=0", "bound=0"),
    ],
)
def test_anything_else_is_rejected_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(InvalidOverflowUrl) as caught:
        parse_url(url)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://user:secret@host", "redis://host:6379/0"),
        ("rediss://:secret@[::1]/2", "rediss://[::1]:6379/2"),
        ("redis+sentinel://user:secret@a,b/mymaster", "redis+sentinel://a:26379,b:26379/mymaster/0"),
        ("rediss+cluster://user:secret@a,b", "rediss+cluster://a:6379,b:6379"),
    ],
)
def test_its_text_has_neither_user_nor_password(url: str, text: str) -> None:
    redis = parse_url(url).redis
    assert str(redis) == text
    assert "secret" not in repr(redis)
    assert "user" not in repr(redis).replace("username", "")
