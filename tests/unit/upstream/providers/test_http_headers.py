"""Headers as plain strings: all of them, or the few that are read."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx2
import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Says, Script

from forebay.upstream import Upstream
from forebay.upstream.providers import Headers
from forebay.upstream.providers.http_headers import RATE_LIMIT_MARK, RELEVANT, normalize_headers

NAMES = st.sampled_from(sorted(RELEVANT)) | st.text(st.characters(codec="latin-1"), max_size=80)
PAIRS = st.lists(st.tuples(NAMES, st.text(st.characters(codec="latin-1"), max_size=20)))


def wire(pairs: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


def is_heeded(name: str) -> bool:
    return name in RELEVANT or RATE_LIMIT_MARK in name


@given(pairs=PAIRS)
def test_what_is_heeded_stands_as_it_does_among_all(pairs: list[tuple[str, str]]) -> None:
    everything = Headers.from_wire(wire(pairs))
    assert Headers.relevant(wire(pairs)) == {name: told for name, told in everything.items() if is_heeded(name)}


def test_names_are_lower_and_values_without_what_surrounds_them() -> None:
    pairs = [(b"Retry-After", b" 5 "), (b"X-RateLimit-Limit-Requests", b"9"), (b"Server", b"x")]
    assert Headers.from_wire(pairs) == {"retry-after": "5", "x-ratelimit-limit-requests": "9", "server": "x"}
    assert Headers.relevant(pairs) == {"retry-after": "5", "x-ratelimit-limit-requests": "9"}
    assert normalize_headers({"Retry-After": "5 "}) == {"retry-after": "5"}


class Asked(Headers):
    """Notes which headers anybody asks for by their names."""

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
async def test_nothing_is_asked_for_that_is_not_heeded(provider: str, asked: set[str]) -> None:
    answers = [
        Says(headers={"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "99", "date": "now"}),
        Says.stream(),
        Says.error(400),
        Says.error(429, retry_after="0.001"),
        Says.error(503),
        Says(),
    ]
    client = Script(httpx2, *answers).client(Upstream("key", provider=provider))
    for _ in range(4):
        await client.post(URL, json=REQUEST, headers={"x-stainless-lang": "python", "user-agent": "OpenAI"})
    assert asked > {"authorization", "content-type", "retry-after", "user-agent"}
    assert {name for name in asked if not is_heeded(name)} == set()
