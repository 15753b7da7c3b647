"""Requests that a gateway rejects by their head alone."""

from __future__ import annotations

import pytest

from forebay.gateway.requests.request_validator import RequestValidator


def error_status(
    *fields: tuple[str, str], method: str = "POST", limit: int = 1_000, local_only: bool = True
) -> int | None:
    raw = [(name.encode(), value.encode()) for name, value in fields]
    found = RequestValidator(max_header_bytes=limit, local_only=local_only).find_error(method, dict(fields), raw)
    return None if found is None else found.status


def test_a_request_of_an_sdk_passes() -> None:
    assert error_status() is None
    assert error_status(("host", "127.0.0.1:8787"), ("x-api-key", "sk-1"), ("transfer-encoding", "chunked")) is None
    assert error_status(("expect", "100-Continue"), method="GET") is None


@pytest.mark.parametrize("name", ["a", "a" * 100])
def test_headers_are_measured_by_their_bytes_on_the_wire(name: str) -> None:
    size = len(f"{name}: b\r\n")
    assert error_status((name, "b"), limit=size) is None
    assert error_status((name, "b"), limit=size - 1) == 431


def test_unsupported_http_is_rejected() -> None:
    assert error_status(method="TRACE", local_only=False) == 405
    assert error_status(method="CONNECT", local_only=False) == 405
    assert error_status(("transfer-encoding", "gzip, chunked"), local_only=False) == 501
    assert error_status(("expect", "more"), local_only=False) == 417


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.:80", "a.localhost", "127.0.0.1", "127.1.2.3:1", "[::1]", "host.docker.internal"]
)
def test_names_of_this_machine_pass(host: str) -> None:
    assert error_status(("host", host), ("origin", f"http://{host}")) is None


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", "0.0.0.0:80", "[::2]"),
        *("10.0.0.1", "[::1", "", "user@evil.example", "localhost@evil.example", "evil.internal"),
    ],
)
def test_names_that_another_machine_could_have_are_rejected(host: str) -> None:
    assert error_status(("host", host)) == 403
    assert error_status(("origin", f"http://{host}")) == 403
    assert error_status(("host", host), ("origin", f"http://{host}"), local_only=False) is None


def test_a_page_without_an_origin_is_rejected() -> None:
    assert error_status(("origin", "null")) == 403


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"sec-fetch-site": "cross-site"}, 403),  # an image, a script or a link of a foreign page
        ({"sec-fetch-site": "cross-site", "referer": "https://evil.example/"}, 403),
        ({"sec-fetch-site": "cross-site", "referer": "https://localhost.evil.example/"}, 403),
        ({"sec-fetch-site": "cross-site", "referer": "http://127.0.0.1:3000/"}, None),
        ({"sec-fetch-site": "cross-site", "origin": "http://localhost:3000"}, None),
        ({"sec-fetch-site": "same-site"}, None),
        ({"sec-fetch-site": "same-origin"}, None),
        ({"sec-fetch-site": "none"}, None),  # the address bar
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_what_a_browser_requests_for_another_site_is_rejected(
    fields: dict[str, str], status: int | None, method: str
) -> None:
    assert error_status(("host", "localhost:8787"), *fields.items(), method=method) == status
    assert error_status(("host", "localhost:8787"), *fields.items(), method=method, local_only=False) is None


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "Api-Key"])
def test_a_header_with_a_key_that_stands_there_twice_is_rejected(name: str) -> None:
    assert error_status((name, "sk-1"), (name, "sk-2"), local_only=False) == 400
    assert error_status((name, "sk-1"), ("accept", "a"), ("accept", "b"), local_only=False) is None


@pytest.mark.parametrize("listed", [["x-api-key"], ["close, X-Api-Key"], ["close", "keep-alive ,\tauthorization"]])
def test_a_connection_header_that_would_drop_a_key_is_rejected(listed: list[str]) -> None:
    fields = [("connection", value) for value in listed]
    assert error_status(*fields, ("x-api-key", "sk-1"), local_only=False) == 400
    assert error_status(("connection", "keep-alive, x-other"), ("x-api-key", "sk-1"), local_only=False) is None


@pytest.mark.parametrize("key", ["Bearer sk\x80", "Bearer sk\x07", "Bearer ské", "sk\x7f"])
def test_a_key_that_would_be_changed_on_the_way_is_rejected(key: str) -> None:
    assert error_status(("authorization", key), local_only=False) == 400
    assert error_status(("authorization", "Bearer\tsk-1 "), ("x-name", key), local_only=False) is None
