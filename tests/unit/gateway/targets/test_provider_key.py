"""The API key of a provider that the gateway holds."""

from __future__ import annotations

import pytest

from forebay.gateway.error_responses import GatewayResponse
from forebay.gateway.targets.provider_key import ProviderKey, without_query_keys
from forebay.upstream.providers import profile_for


@pytest.mark.parametrize(
    ("provider", "path", "header"),
    [
        ("openai", "/v1/chat/completions", ("authorization", "Bearer sk-1")),
        ("anthropic", "/v1/messages?beta=true", ("x-api-key", "sk-1")),
        ("anthropic", "/v1/models", ("x-api-key", "sk-1")),
        ("anthropic", "/v1/chat/completions", ("authorization", "Bearer sk-1")),
        ("azure", "/openai/deployments/gpt-4o/chat/completions", ("api-key", "sk-1")),
        ("vllm", "/v1/completions", ("authorization", "Bearer sk-1")),
        ("generic", "/anything", ("authorization", "Bearer sk-1")),
    ],
)
def test_a_key_stands_where_its_provider_reads_it(provider: str, path: str, header: tuple[str, str]) -> None:
    assert ProviderKey("sk-1", profile_for(provider)).header(path) == header


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/x", "/v1/x"),
        ("/v1/x?", "/v1/x?"),
        ("/v1/x?a=1&b=%2F", "/v1/x?a=1&b=%2F"),
        ("/v1/x?key=s", "/v1/x"),
        ("/v1/x?a=1&KEY=s&b&%6bey=s&api-key=s&subscription%2Dkey=s", "/v1/x?a=1&b"),
        ("/v1/x?monkey=1&keys=2", "/v1/x?monkey=1&keys=2"),
    ],
)
def test_the_keys_in_a_query_are_cut_out(path: str, sent: str) -> None:
    assert without_query_keys(path) == sent


def test_a_key_is_shown_neither_by_its_repr_nor_by_errors_that_quote_it() -> None:
    key = ProviderKey("sk-1", profile_for("openai"))
    assert "sk-1" not in repr(key)
    assert key.redact(GatewayResponse(400, (), b"bad key sk-1, sk-1")).body == b"bad key ***, ***"
    assert key.redact(GatewayResponse(200, (), b"sk-1")).body == b"sk-1"
