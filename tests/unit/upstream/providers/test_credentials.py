"""The account of a request: the same for every spelling of a key that its provider takes for that key."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from forebay.upstream import HttpRequest, Upstream
from forebay.upstream.http_call import HttpCall

CHAT, MESSAGES, FILES = "/v1/chat/completions", "/v1/messages", "/v1/files"


def account_name(upstream: Upstream, path: str, **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpCall(upstream.core, HttpRequest("POST", "https://a.test" + path, named, b"{}")).account.name


@pytest.mark.parametrize(
    "spelt",
    ["Bearer sk-1", "bearer sk-1", "BEARER sk-1", "Bearer  sk-1", "Bearer\tsk-1", " Bearer sk-1 ", "sk-1"],
)
@pytest.mark.parametrize("provider", ["openai", "anthropic", "azure", "generic"])
def test_every_spelling_of_a_key_is_one_account(provider: str, spelt: str) -> None:
    upstream = Upstream("u", provider=provider)
    assert account_name(upstream, CHAT, Authorization=spelt) == account_name(upstream, MESSAGES, x_api_key="sk-1")
    assert account_name(upstream, CHAT, Authorization="Bearer SK-1") != account_name(
        upstream, CHAT, Authorization=spelt
    )


def test_keys_that_look_alike_where_they_are_shown_have_accounts_of_their_own() -> None:
    upstream, shown = Upstream("u"), dict[str, str]()
    digests = ((hashlib.sha256(f"sk-{number}".encode()).hexdigest(), f"sk-{number}") for number in itertools.count())
    for digest, key in digests:
        if (other := shown.setdefault(digest[:8], key)) != key:
            break
    first, second = (upstream.core.accounts.account("m", each) for each in (other, key))
    assert first.name == second.name
    assert first is not second


def test_another_scheme_is_another_account() -> None:
    upstream = Upstream("u")
    basic = account_name(upstream, CHAT, Authorization="Basic sk-1")
    assert basic == account_name(upstream, CHAT, Authorization="basic  sk-1")
    assert basic != account_name(upstream, CHAT, Authorization="Bearer sk-1")


@pytest.mark.parametrize(
    ("provider", "path", "counts"),
    [
        ("openai", CHAT, "authorization"),
        ("vllm", MESSAGES, "authorization"),
        ("anthropic", MESSAGES, "x_api_key"),
        ("anthropic", FILES, "x_api_key"),
        ("anthropic", CHAT, "authorization"),
        ("azure", CHAT, "api_key"),
    ],
)
def test_headers_that_the_provider_does_not_read_make_no_account(provider: str, path: str, counts: str) -> None:
    upstream = Upstream("u", provider=provider)
    alone = account_name(upstream, path, **{counts: "sk-1"})
    junk = {name: f"junk {name}" for name in ("authorization", "x_api_key", "api_key") if name != counts}
    assert account_name(upstream, path, **{counts: "sk-1"}, **junk) == alone
