"""HTTP headers by lower-case name: all of them, or the relevant ones."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx2
import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Reply, Script

from forebay.upstream import Upstream
from forebay.upstream.providers import Headers
from forebay.upstream.providers.http_headers import RATE_LIMIT_MARK, RELEVANT, normalize_headers

NAMES = st.sampled_from(sorted(RELEVANT)) | st.text(st.characters(codec="latin-1"), max_size=80)
PAIRS = st.lists(st.tuples(NAMES, st.text(st.characters(codec="latin-1"), max_size=20)))


def wire(pairs: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


def is_relevant(name: str) -> bool:
    return name in RELEVANT or RATE_LIMIT_MARK in name


@given(pairs=PAIRS)
def test_relevant_headers_are_the_same_as_among_all(pairs: list[tuple[str, str]]) -> None:
    everything = Headers.from_wire(wire(pairs))
    assert Headers.relevant(wire(pairs)) == {name: value for name, value in everything.items() if is_relevant(name)}


def test_names_are_lower_case_and_values_are_stripped() -> None:
    pairs = [(b"Retry-After", b" 5 "), (b"X-RateLimit-Limit-Requests", b"9"), (b"Server", b"x")]
    assert Headers.from_wire(pairs) == {"retry-after": "5", "x-ratelimit-limit-requests": "9", "server": "x"}
    assert Headers.relevant(pairs) == {"retry-after": "5", "x-ratelimit-limit-requests": "9"}
    assert normalize_headers({"Retry-After": "5 "}) == {"retry-after": "5"}


class Asked(Headers):
    """Headers that record the names that are looked up."""

    names: ClassVar[set[str]] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(Asked, "names", set())
    monkeypatch.setattr(Headers, "relevant", Asked.from_wire)
    return Asked.names


@pytest.mark.parametrize("provider", ["openai", "azure", "anthropic", "generic"])
async def test_only_relevant_headers_are_looked_up(provider: str, asked: set[str]) -> None:
    answers = [
        Reply(headers={"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "99", "date": "now"}),
        Reply.stream(),
        Reply.error(400),
        Reply.error(429, retry_after="0.001"),
        Reply.error(503),
        Reply(),
    ]
    client = Script(httpx2, *answers).client(Upstream("key", provider=provider))
    for _ in range(4):
        await client.post(URL, json=REQUEST, headers={"x-stainless-lang": "python", "user-agent": "OpenAI"})
    assert asked > {"authorization", "content-type", "retry-after", "user-agent"}
    assert {name for name in asked if not is_relevant(name)} == set()
