"""What a gateway refuses by the head of a request alone."""

from __future__ import annotations

import pytest

from forebay.gateway.request_validator import RequestValidator


def objection(*fields: tuple[str, str], method: str = "POST", most: int = 1_000, own_only: bool = True) -> int | None:
    raw = [(name.encode(), value.encode()) for name, value in fields]
    found = RequestValidator(max_header_bytes=most, local_only=own_only).find_error(method, dict(fields), raw)
    return None if found is None else found.status


def test_what_an_sdk_sends_is_let_in() -> None:
    assert objection() is None
    assert objection(("host", "127.0.0.1:8787"), ("x-api-key", "sk-1"), ("transfer-encoding", "chunked")) is None
    assert objection(("expect", "100-Continue"), method="GET") is None


@pytest.mark.parametrize("name", ["a", "a" * 100])
def test_headers_are_measured_as_they_stand_on_the_wire(name: str) -> None:
    size = len(f"{name}: b\r\n")
    assert objection((name, "b"), most=size) is None
    assert objection((name, "b"), most=size - 1) == 431


def test_what_nobody_here_understands_is_refused() -> None:
    assert objection(method="TRACE", own_only=False) == 405
    assert objection(method="CONNECT", own_only=False) == 405
    assert objection(("transfer-encoding", "gzip, chunked"), own_only=False) == 501
    assert objection(("expect", "more"), own_only=False) == 417


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.:80", "a.localhost", "127.0.0.1", "127.1.2.3:1", "[::1]", "host.docker.internal"]
)
def test_this_machine_has_many_names(host: str) -> None:
    assert objection(("host", host), ("origin", f"http://{host}")) is None


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", "0.0.0.0:80", "[::2]"),
        *("10.0.0.1", "[::1", "", "user@evil.example", "localhost@evil.example", "evil.internal"),
    ],
)
def test_but_none_that_somebody_else_could_have(host: str) -> None:
    assert objection(("host", host)) == 403
    assert objection(("origin", f"http://{host}")) == 403
    assert objection(("host", host), ("origin", f"http://{host}"), own_only=False) is None


def test_a_page_without_a_name_is_from_elsewhere() -> None:
    assert objection(("origin", "null")) == 403
