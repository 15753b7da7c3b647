"""Rerouted requests: only the necessary parts change, and no key is sent to another provider."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forebay import Fallback, Upstream
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.fallbacks.reroute import ReroutedRequest, can_reroute, reroute_request
from forebay.upstream.providers import Headers, profile_for

KEY = "sk-1"
CHAT = "/v1/chat/completions"
BODY = b'{"model": "gpt-4o", "messages" : [ {"role":"user","content":"\\u00e9 1.0"} ], "x": 1e2}'


def route_of(fallback: Fallback, model: str = "gpt-4o", **how: Any) -> FallbackRoute:
    (route,) = Upstream("first", **{"provider": "openai", **how}, fallback=fallback).runner.resolver.routes(model)
    return route


def to_mini() -> FallbackRoute:
    return route_of(Fallback(to="gpt-4o-mini"), models={"gpt-4o": (), "gpt-4o-mini": ()})


def to_other(provider: str = "openai", model: str = "gpt-4o", first: str = "openai", **how: Any) -> FallbackRoute:
    return route_of(Fallback(to=Upstream("other", provider=provider), **how), model, provider=first)


def send(
    route: FallbackRoute, path: str = CHAT, body: bytes = BODY, method: str = "POST", **headers: str
) -> ReroutedRequest | None:
    read = profile_for("openai").read_request(method, path, headers, body)
    return reroute_request(route, path, read, body, KEY) if can_reroute(route, read, read.model or "") else None


def sent(route: FallbackRoute, path: str = CHAT, body: bytes = BODY) -> ReroutedRequest:
    found = send(route, path, body)
    assert found is not None
    return found


def test_another_model_is_all_that_changes_in_a_body() -> None:
    changed = sent(to_mini())
    unchanged = b'[ {"role":"user","content":"\\u00e9 1.0"} ]', b"1e2"
    assert changed.body == b'{"model":"gpt-4o-mini","messages":%b,"x":%b}' % unchanged
    assert (changed.origin, changed.path, changed.added_headers) == (None, CHAT, {})
    headers = Headers({"authorization": "Bearer sk-1", "content-length": "3", "x": "y"})
    assert changed.headers(headers) == {"authorization": "Bearer sk-1", "x": "y"}


def test_with_azure_the_path_names_the_model() -> None:
    path = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
    body = b'{"messages":[]}'
    route = route_of(Fallback(to="mini/1"), provider="azure", models={"gpt-4o": (), "mini/1": ()})
    changed = sent(route, path, body)
    assert changed.path == "/openai/deployments/mini%2F1/chat/completions?api-version=2024-10-21"
    assert changed.body == body


@pytest.mark.parametrize(
    ("provider", "base_url", "path", "expected"),
    [
        ("openai", "https://b.test/v1", CHAT, "https://b.test/v1/chat/completions"),
        ("openai", "http://b.test:8000/v1/", "/v1/responses?beta=1&x=1", "http://b.test:8000/v1/responses?beta=1"),
        ("openai", "https://b.test/v1?key=1", CHAT, "https://b.test/v1/chat/completions?key=1"),
        ("vllm", "http://b.test/v1", "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
         "http://b.test/v1/chat/completions"),
        ("azure", "https://b.test", "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
         "https://b.test/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"),
        ("azure", "https://b.test/openai/v1", CHAT, "https://b.test/openai/v1/chat/completions"),
        ("azure", "https://b.test/openai/deployments/x?api-version=1", CHAT,
         "https://b.test/openai/deployments/x/chat/completions?api-version=1"),
    ],
)  # fmt: skip
def test_the_url_is_built_from_the_other_base_url_as_an_sdk_would_build_it(
    provider: str, base_url: str, path: str, expected: str
) -> None:
    changed = sent(to_other(provider, base_url=base_url), path)
    assert f"{changed.origin}{changed.path}" == expected


@pytest.mark.parametrize("base_url", ["https://b.test", "https://b.test/v1"])
def test_with_anthropic_the_base_url_may_lack_the_version(base_url: str) -> None:
    route = to_other("anthropic", first="anthropic", base_url=base_url, api_key="sk-2")
    changed = sent(route, "/v1/messages")
    assert f"{changed.origin}{changed.path}" == "https://b.test/v1/messages"
    assert changed.added_headers == {"x-api-key": "sk-2"}
    assert route.auth_headers("Bearer sk-1") == {"authorization": "Bearer sk-2"}  # as its SDK does from version 2 on


def test_headers_that_identify_the_caller_are_not_sent_to_another_provider() -> None:
    headers = Headers(
        {"authorization": "Bearer sk-1", "cookie": "c", "openai-organization": "o", "host": "a.test", "accept": "x"}
    )
    assert sent(to_other(base_url="https://b.test")).headers(headers) == {"accept": "x"}
    rerouted = sent(to_other(base_url="https://b.test", api_key="sk-2")).headers(headers)
    assert rerouted == {"accept": "x", "authorization": "Bearer sk-2"}
    assert sent(to_other("azure", api_key="sk-2")).headers(headers) == {"accept": "x", "api-key": "sk-2"}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "x-goog-api-key",
            "x-amz-security-token",
            "x-auth-token",
            "x-litellm-key",
            "helicone-auth",
            "anthropic-api-key",
        ),
        *("cf-aig-authorization", "ocp-apim-subscription-key", "authentication", "x-forwarded-for", "x-forebay-token"),
        *("my-own-key", "x-session-token", "proxy-authorization", "openai-project"),
    ],
)
def test_another_provider_gets_no_header_that_it_does_not_need(name: str) -> None:
    needed = {
        "accept": "x",
        "content-type": "application/json",
        "user-agent": "x",
        "anthropic-version": "1",
        "anthropic-beta": "x",
        "x-stainless-lang": "python",
        "traceparent": "00",
    }
    headers = Headers({name: "secret", **needed})
    assert sent(to_other(base_url="https://b.test", api_key="sk-2")).headers(headers) == {
        **needed,
        "authorization": "Bearer sk-2",
    }
    assert sent(to_mini()).headers(headers) == headers  # the same provider and key


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (CHAT + "?key=s&api_key=s&code=s&beta=true&anything=s", CHAT + "?beta=true"),
        (CHAT + "?sig=s&api-version=1&%6bey=s", CHAT + "?api-version=1"),
        (CHAT + "?key=s", CHAT),
    ],
)
def test_another_provider_gets_no_key_of_the_query(path: str, expected: str) -> None:
    assert sent(to_other(api_key="sk-2"), path).path == expected


def test_the_query_of_an_unknown_endpoint_keeps_all_but_keys() -> None:
    route = to_other("generic", "", "generic", base_url="https://mirror.test/api")
    query = "q=x&key=s&api_key=s&access_token=s&Signature=s&X-Amz-Credential=s&page=2"
    changed = send(route, "/search?" + query, b"", "GET")
    assert changed is not None
    assert changed.path == "/api/search?q=x&page=2"


def test_the_account_belongs_to_the_other_key() -> None:
    route = to_other(base_url="https://b.test", api_key="sk-2")
    assert route.account("Bearer sk-1") is route.upstream.core.accounts.account("gpt-4o", "Bearer sk-2")
    mini = to_mini()
    assert mini.account("Bearer sk-1") is mini.upstream.core.accounts.account(mini.model, "Bearer sk-1")


def test_a_request_that_cannot_be_changed_or_served_by_the_other_is_not_rerouted() -> None:
    other = to_other(base_url="https://b.test/v1", model="gpt-4o")
    assert send(to_mini(), authorization="AWS4-HMAC-SHA256 x") is None
    assert send(to_mini(), CHAT, BODY, "POST", **{"content-encoding": "gzip"}) is None
    assert send(to_mini(), body=b"garbage") is None
    assert send(other, "/v1/files", b"{}") is None
    assert send(other, "/v1/models", b"", "GET") is None
    continued = json.dumps({"model": "gpt-4o", "input": "x", "previous_response_id": "resp_1"}).encode()
    assert send(other, "/v1/responses", continued) is None
    assert send(to_mini(), "/v1/responses", continued) is not None
    assert send(other, "/v1/responses", continued.replace(b'"resp_1"', b"null")) is not None


def test_embeddings_are_rerouted_to_another_model_only_if_a_fallback_names_it() -> None:
    body = json.dumps({"model": "embed-1", "input": "x"}).encode()
    path = "/v1/embeddings"
    models = {"embed-1": (), "embed-2": ()}
    assert send(route_of(Fallback(to="embed-2"), "embed-1", models=models), path, body) is None
    assert send(route_of(Fallback(to="embed-2", models="embed-*"), "embed-1", models=models), path, body) is not None
    assert send(to_other(model="embed-1", base_url="https://b.test"), path, body) is not None


def test_a_request_without_a_model_is_rerouted_between_generic_upstreams() -> None:
    route = to_other("generic", "", "generic", base_url="https://mirror.test/api")
    changed = send(route, "/search?q=x", b"", "GET")
    assert changed is not None
    assert f"{changed.origin}{changed.path}" == "https://mirror.test/api/search?q=x"


def test_fallback_routes_have_no_loop_and_no_account_twice() -> None:
    models = {"a": (), "b": (), "c": ()}
    up = Upstream("up", models=models, fallback=[Fallback(to="b"), Fallback(to="c"), Fallback(to="b", models="a")])
    routes = up.runner.resolver.routes("a")
    own = up.core.accounts.account("a")
    assert [shared.name for _, shared in up.runner.resolver.accounts(own, routes)] == ["upstream:up:b", "upstream:up:c"]
    assert [
        shared.name
        for _, shared in up.runner.resolver.accounts(up.core.accounts.account("b"), up.runner.resolver.routes("b"))
    ] == ["upstream:up:c"]
    other = Upstream("other", models=models, fallback=[Fallback(to=up), Fallback(to="b")])
    found = [(route.upstream.name, route.model) for route in other.runner.resolver.routes("a")]
    assert found == [("up", "a"), ("other", "b"), ("up", "b"), ("up", "c"), ("up", "b")]
