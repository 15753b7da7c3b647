from __future__ import annotations

from forebay.gateway.requests.request_head import RequestHead, RequestHeads

CHAT = "/v1/chat/completions"
KEY = (b"authorization", b"Bearer sk-1")


def read(heads: RequestHeads, *headers: tuple[bytes, bytes], method: str = "POST", path: str = CHAT) -> RequestHead:
    return heads.read(method, path, headers)


def test_a_head_is_read_once_whatever_the_length_of_its_body() -> None:
    heads = RequestHeads()
    first = read(heads, KEY, (b"content-length", b"12"))
    assert read(heads, KEY, (b"content-length", b"4711")) is first
    assert read(heads, (b"Content-Length", b"5"), KEY) is first


def test_heads_with_different_keys_are_different() -> None:
    heads = RequestHeads()
    first, second = read(heads, KEY), read(heads, (b"authorization", b"Bearer sk-2"))
    assert first.headers.by_name != second.headers.by_name
    assert first.headers.credentials != second.headers.credentials


def test_heads_with_different_methods_or_paths_are_different() -> None:
    heads = RequestHeads()
    first = read(heads, KEY)
    assert read(heads, KEY, method="PUT") is not first
    assert read(heads, KEY, path="/v1/embeddings") is not first


def test_the_encoding_of_a_body_makes_another_head() -> None:
    heads = RequestHeads()
    assert read(heads, KEY, (b"transfer-encoding", b"chunked")) is not read(heads, KEY)


def test_a_long_head_is_not_kept() -> None:
    heads = RequestHeads()
    long = (b"x-trace", b"a" * 5000)
    assert read(heads, KEY, long) is not read(heads, KEY, long)


def test_a_bounded_number_of_heads_is_kept() -> None:
    heads = RequestHeads()
    for number in range(2500):
        read(heads, KEY, (b"x-trace", b"%d" % number))
    assert len(heads) == 1000
    assert read(heads, KEY, (b"x-trace", b"2499")) is read(heads, KEY, (b"x-trace", b"2499"))


def test_a_head_is_sent_without_what_holds_for_one_connection() -> None:
    head = read(RequestHeads(), KEY, (b"connection", b"close, x-hop"), (b"x-hop", b"1"), (b"x-forebay-task", b"t"))
    assert head.headers.sent(metered=False).wire == b"authorization: Bearer sk-1\r\naccept-encoding: identity\r\n"


def test_a_response_that_is_metered_is_not_asked_for_in_gzip() -> None:
    head = read(RequestHeads(), (b"accept-encoding", b"gzip, br"))
    assert head.headers.sent(metered=False).wire == b"accept-encoding: gzip\r\n"
    assert head.headers.sent(metered=True).wire == b"accept-encoding: identity\r\n"
