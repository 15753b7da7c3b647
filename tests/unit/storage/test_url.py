"""The URL of a store: each known form is parsed, anything else is rejected with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.errors import InvalidOverflowUrl
from forebay.storage import Fsync, SqsUrl, StoreUrl, parse_url


@pytest.mark.parametrize(
    ("url", "store"),
    [
        ("memory://", StoreUrl(scheme="memory")),
        ("memory://?bound=7", StoreUrl(scheme="memory", bound=7)),
        ("sqlite:///spill.db", StoreUrl(scheme="sqlite", path=Path.cwd() / "spill.db")),
        ("sqlite:///var/spill.db", StoreUrl(scheme="sqlite", path=Path.cwd() / "var" / "spill.db")),
        ("sqlite:////var/spill.db", StoreUrl(scheme="sqlite", path=Path("/var/spill.db"))),
        ("sqlite:////a%20b%23c%3Fd.db", StoreUrl(scheme="sqlite", path=Path("/a b#c?d.db"))),
        (
            "sqlite:////s.db?bound=1000000&fsync=checkpoint",
            StoreUrl(scheme="sqlite", path=Path("/s.db"), bound=1_000_000, fsync=Fsync.CHECKPOINT),
        ),
        ("sqs://queue", StoreUrl(scheme="sqs", sqs=SqsUrl(queue="queue"))),
        (
            (
                "sqs://a_B-1.fifo?endpoint=http://127.0.0.1:5000&region=eu-west-1&create=no&bound=7"
                "&results=sqlite:////s.db?fsync=no"
            ),
            StoreUrl(
                scheme="sqs",
                bound=7,
                sqs=SqsUrl(
                    queue="a_B-1",
                    fifo=True,
                    endpoint="http://127.0.0.1:5000",
                    region="eu-west-1",
                    create=False,
                    results=StoreUrl(scheme="sqlite", path=Path("/s.db"), bound=7, fsync=Fsync.NO),
                ),
            ),
        ),
        ("sqlite:////s.db?fsync=yes", StoreUrl(scheme="sqlite", path=Path("/s.db"))),
        ("sqlite:////s.db?fsync=no", StoreUrl(scheme="sqlite", path=Path("/s.db"), fsync=Fsync.NO)),
    ],
)
def test_a_known_form_is_parsed(url: str, store: StoreUrl) -> None:
    assert parse_url(url) == store


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "does not begin with"),
        ("spill.db", "does not begin with"),
        ("/var/spill.db", "does not begin with"),
        ("postgres://host/db", "no store 'postgres'"),
        ("sqlite://spill.db", "three slashes"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:////var/", "names no file"),
        ("sqlite:///a%00b", "names no file"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///a#b.db", "%23"),
        ("memory://name", "no name"),
        ("memory:///path", "no name or path"),
        ("memory://?fsync=no", "no option 'fsync'"),
        ("sqlite:///a.db?bund=1", "no option 'bund'"),
        ("sqs://", "it names no queue"),
        ("sqs:///queue", "it names no queue"),
        ("sqs://queue/other", "it names no queue"),
        ("sqs://key:secret@queue", "credentials are taken from the environment"),
        ("sqs://queue:5000", "it names no queue"),
        ("sqs://a.b", "it names no queue"),
        (f"sqs://{'a' * 72}", "at most 71"),
        ("sqs://queue?endpoint=localhost:5000", "its endpoint is not an address"),
        ("sqs://queue?endpoint=http://key:secret@host", "without credentials"),
        ("sqs://queue?create=maybe", "neither yes nor no"),
        ("sqs://queue?results=sqs://other", "must name a store with results"),
        ("sqs://queue?results=postgres://host", "no store 'postgres'"),
        ("sqs://queue?results=memory://?bound=5", "bound is an option of the overflow"),
        ("sqs://queue?fifo=yes", "no option 'fifo'"),
        ("sqlite:///a.db?bound=1&bound=2", "twice"),
        ("sqlite:///a.db?bound=0", "bound=0"),
        ("sqlite:///a.db?bound=-1", "bound=-1"),
        ("sqlite:///a.db?bound=1e5", "bound=1e5"),
        ("sqlite:///a.db?bound=", "bound= is"),
        ("sqlite:///a.db?bound=99999999999999999999", "is not a whole number of tasks"),
        ("sqlite:///a.db?fsync=on", "fsync=on is none of yes, checkpoint, no"),
        ("sqlite:///a.db?fsync=NO", "fsync=NO is none of yes, checkpoint, no"),
        ("sqlite:///a.db?synchronous=off", "is now fsync=, and full is yes, normal is checkpoint, off is no"),
        ("sqlite://[/a.db", "its host is malformed"),
        ("redis:127.0.0.1", "does not begin with"),
        ("redis:///user:secret@host", "with two slashes"),
        ("redis://host?password=secret", "a user and a password are before the host: redis://user:password@host"),
    ],
)
def test_anything_else_is_rejected_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(InvalidOverflowUrl) as caught:
        parse_url(url)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://user:secret@host:6379/0",
        "redis://user:secret@host:6379/x",
        "redis://user:sec/secret@host",
        "redis://user:secret\u2100@host",
        "redis://user:sec@secret@host:port",
    ],
)
def test_a_rejection_shows_the_host_without_the_password(url: str) -> None:
    with pytest.raises(InvalidOverflowUrl) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)
    host = url.rpartition("@")[2]
    assert f"://***@{'***' if host == 'host:port' else host}" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:sec?secret@host", "redis://***"),
        ("redis://user:sec#secret@host", "redis://***"),
        ("redis://host?password=sec@secret", "redis://***"),
        ("redis://user:secret@[host", "redis://***@***"),
        ("redis://user:secret", "redis://***"),
        ("redis://:secret/0", "redis://***/0"),
        ("redis://host/sec:secret", "redis://host/***"),
        ("redis://host/0#secret", "redis://host/***"),
        ("redis://host?password=secret", "redis://host?password=***"),
        ("redis://host?passwrod=secret&bound=5", "redis://host?passwrod=***&bound=5"),
        ("redis://host?Secret=1", "redis://host?***=***"),
        ("redis://host?secret:", "redis://host?***"),
        ("redis://host?fsync=yes;password=secret", "redis://host?fsync=***"),
        ("redis://host?bound=5;password=secret", "redis://host?bound=***"),
        ("redis://host?replicas=1,secret", "redis://host?replicas=***"),
        ("sqlite:///a.db?fsync=on;secret", "sqlite:///a.db?fsync=***"),
        ("redis:user:secret@host:1/0", "redis:***@host:1/0"),
        ("redis:secret", "redis:***"),
        ("redis:/user:secret@host", "redis:/***@host"),
        ("redis:///user:secret@host", "redis:///***@host"),
        (" redis:////user:secret@host", "redis:////***@host"),
        ("user:secret@host:6379", "***@host:6379"),
        ("secret:secret@host", "***@host"),
        (":secret@host", "***@host"),
        ("secret:x://host", "***"),
        ("secret:6379", "***"),
        ("user:se://secret@host", "***@host"),
        ("sqs://key:secret", "sqs://***"),
        ("sqs://queue?results=redis://host?password=secret", "sqs://queue?results=***"),
        ("sqs://queue?results=redis://user:secret", "sqs://queue?results=***"),
        ("sqs://queue?results=redis://:secret%2540host/x", "sqs://queue?results=***"),
        ("sqs://queue?endpoint=http://[secret", "sqs://queue?endpoint=***"),
        ("sqlite:////a@b.db?bund=1", "sqlite:////a@b.db?bund=***"),
        ("spill.db", "spill.db"),
    ],
)
def test_a_rejection_shows_nothing_that_could_be_a_password(url: str, shown: str) -> None:
    with pytest.raises(InvalidOverflowUrl) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)
    assert f"The overflow {shown!r} cannot be opened" in str(caught.value)
