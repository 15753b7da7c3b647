"""Targets, and the destinations of requests."""

from __future__ import annotations

import pytest

from forebay.gateway import TargetSettings
from forebay.gateway.targets.provider_key import ProviderKey
from forebay.gateway.targets.targets import Target, detect_protocol, find_destination
from forebay.upstream.providers import profile_for

TARGETS = [
    Target(TargetSettings(name="openai", url="https://api.openai.test/")),
    Target(TargetSettings(name="anthropic", url="https://api.anthropic.test")),
    Target(TargetSettings(name="local", url="http://localhost:8000/llm")),
]


@pytest.mark.parametrize(
    ("path", "headers", "url"),
    [
        ("/v1/chat/completions", {}, "https://api.openai.test/v1/chat/completions"),
        ("/v1/messages?beta=true", {}, "https://api.anthropic.test/v1/messages?beta=true"),
        ("/v1/messages/count_tokens", {}, "https://api.anthropic.test/v1/messages/count_tokens"),
        ("/v1/models", {"authorization": "Bearer k"}, "https://api.openai.test/v1/models"),
        ("/v1/models", {"x-api-key": "k"}, "https://api.anthropic.test/v1/models"),
        ("/v1/models/a%2Fb", {}, "https://api.openai.test/v1/models/a%2Fb"),
        ("/v1/files", {"x-api-key": "k"}, "https://api.anthropic.test/v1/files"),
        ("/v1/chat/completions", {"x-api-key": "k"}, "https://api.openai.test/v1/chat/completions"),
        ("/v1/embeddings", {"anthropic-version": "1"}, "https://api.openai.test/v1/embeddings"),
        ("/v1/messages/batches", {"authorization": "k"}, "https://api.anthropic.test/v1/messages/batches"),
        ("/v1/models?a=/v1/messages", {}, "https://api.openai.test/v1/models?a=/v1/messages"),
        ("/v1/models", {"authorization": "Bearer k", "x-api-key": "k"}, "https://api.openai.test/v1/models"),
        ("/local/v1/chat/completions", {}, "http://localhost:8000/llm/v1/chat/completions"),
        ("/local/api/tags", {}, "http://localhost:8000/llm/api/tags"),
        ("/anthropic/v1/models", {}, "https://api.anthropic.test/v1/models"),
    ],
)
def test_a_request_goes_where_its_path_leads(path: str, headers: dict[str, str], url: str) -> None:
    destination = find_destination(TARGETS, path, headers)
    assert destination is not None
    assert destination.url == url


@pytest.mark.parametrize(
    "path", ["/", "", "/v1", "/v1/", "/local", "/nobody/v1/models", "/local/../admin", "/v1/../x", "/v2/models"]
)
def test_an_unknown_or_ambiguous_path_leads_nowhere(path: str) -> None:
    assert find_destination(TARGETS, path, {}) is None


@pytest.mark.parametrize(
    "path",
    [
        *("/..;/admin", "/..;a=b/..;/admin", "/.;/x", "/;/x", "/%2e%2e;/x", "/..%3b/x", "/v1/..%3Ba/x"),
        *("/%252e%252e/x", "/v1/%252e%252e/%252e%252e/x", "/v1/..%255cx", "/v1/a%252Fb", "/v1/chat%252fcompletions"),
        *("/v1/..%00/x", "/v1/chat/completions%00", "/v1/.%09./x", "/v1/%0d%0ax", "/v1/x%7f"),
        *("/v1/%c0%ae%c0%ae/x", "/v1/%e0%80%ae/x", "/v1/%ff/x", "/v1/%uff0e%uff0e/x", "/v1/%/x", "/v1/%2", "/v1/%zz"),
        *("/v1/..%20/x", "/v1/%20../x", "/v1/..%5cx", "/v1/..%2fx"),
    ],
)
def test_no_path_is_read_in_two_ways(path: str) -> None:
    assert find_destination(TARGETS, "/local" + path, {}) is None
    if path.startswith("/v1/"):
        assert find_destination(TARGETS, path, {}) is None


@pytest.mark.parametrize(
    "path",
    ["/v1/models/meta%2Fllama%203", "/v1/models/a;b", "/v1/files/%E6%B0%B4", "/v1/models/a..b", "/v1/x%25", "/v1/..."],
)
def test_an_unusual_path_that_is_read_in_one_way_passes(path: str) -> None:
    destination = find_destination(TARGETS, "/local" + path, {})
    assert destination is not None
    assert destination.path == path


def test_a_protocol_without_a_target_leads_nowhere() -> None:
    assert find_destination(TARGETS[:1], "/v1/messages", {}) is None
    assert find_destination(TARGETS[:1], "/v1/messages", {"x-api-key": "k"}) is None
    assert find_destination(TARGETS[:1], "/v1/models", {"x-api-key": "k", "anthropic-version": "1"}) is None
    assert find_destination(TARGETS[1:2], "/v1/chat/completions", {"x-api-key": "k"}) is None


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/responses", "/v1/audio/speech"])
def test_a_key_in_x_api_key_reaches_the_only_target(path: str) -> None:
    destination = find_destination(TARGETS[:1], path, {"x-api-key": "k"})
    assert destination is not None
    assert destination.target is TARGETS[0]


def test_the_protocol_is_detected_by_path_and_headers() -> None:
    assert detect_protocol("/v1/messages", {}) == "anthropic"
    assert detect_protocol("/v1/models", {"anthropic-version": "2023-06-01"}) == "anthropic"
    assert detect_protocol("/v1/responses", {}) == "openai"


def test_calls_with_a_held_key_may_use_the_key_of_a_fallback_also_after_a_reload() -> None:
    settings = TargetSettings(name="openai", url="https://api.openai.com", api_key_env="HELD")
    old = Target(settings)
    profile = profile_for("openai")
    assert "sk-1" in Target(settings, keys=[ProviderKey("sk-1", profile)]).upstream.core.accepted_keys
    new = Target(settings, keys=[ProviderKey("sk-2", profile)])
    new.adopt(old)
    assert "Bearer sk-2" in new.upstream.core.accepted_keys
    assert "sk-1" not in new.upstream.core.accepted_keys
