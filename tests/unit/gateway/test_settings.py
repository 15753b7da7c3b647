"""The settings of a gateway, and the error for each mistake."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.errors import InvalidPrice, InvalidSetting
from forebay.gateway import (
    ContextSettings,
    FallbackSettings,
    GatewaySettings,
    InvalidProviderKey,
    InvalidSecret,
    QuotaSettings,
    TargetSettings,
    TenantSettings,
)
from forebay.gateway.settings import KeySettings
from forebay.gateway.targets.targets import make_targets
from forebay.quota import Price, Quota

URL = "https://api.openai.com"
TOKEN = "0123456789abcdef"


def target(**changes: Any) -> TargetSettings:
    return TargetSettings(**{"name": "openai", "url": URL, **changes})


def gateway(**changes: Any) -> GatewaySettings:
    return GatewaySettings(**{"targets": (target(),), **changes})


# --- targets ---


@pytest.mark.parametrize(
    ("name", "provider", "profile"),
    [
        ("openai", None, "openai"),
        ("anthropic", None, "anthropic"),
        ("llama.cpp", None, "llama.cpp"),
        ("my-server", None, "openai-compatible"),
        ("spare", "anthropic", "anthropic"),
        ("openai", "generic", "generic"),
    ],
)
def test_a_target_has_the_rules_of_its_provider(name: str, provider: str | None, profile: str) -> None:
    upstream = target(name=name, provider=provider).upstream()
    assert upstream.name == name
    assert upstream.core.profile.provider == profile


def test_a_target_makes_an_upstream_with_its_settings() -> None:
    upstream = target(
        rpm=500,
        models={"gpt-4o*": QuotaSettings(rpm=10, input_tpm=1000, output_tpm=200, tpm=1100), "o3": QuotaSettings()},
        max_concurrent=7,
        budget_usd=25,
        tenant_budget_usd=5.0,
        task_budget_usd=0.5,
        prices={"mine": Price(input=1, output=2)},
        max_wait=20,
        max_attempts=2,
        weights={"acme": 3.0},
    ).upstream()
    settings = upstream.core.settings
    assert settings.quotas == (Quota(requests=500, per="minute"),)
    assert settings.models == {
        "gpt-4o*": (
            Quota(requests=10, per="minute"),
            Quota(input_tokens=1000, per="minute"),
            Quota(output_tokens=200, per="minute"),
            Quota(tokens=1100, per="minute"),
        ),
        "o3": (),
    }
    assert (settings.max_concurrent, settings.max_wait, settings.weights) == (7, 20, {"acme": 3.0})
    assert (upstream.core.retry.max_attempts, upstream.core.retry.max_total_delay) == (2, 20)
    assert upstream.core.prices.usd("openai", "mine", 1_000_000, 0) == 1.0


async def test_a_target_has_budgets_per_day_per_tenant_and_per_task() -> None:
    spend = target(budget_usd=25, tenant_budget_usd=5, prices={"*": Price(input=1, output=1)}).upstream()
    async with spend.call("m", input_tokens=1_000_000, tenant="acme") as call:
        call.settle(input_tokens=1_000_000, output_tokens=0)
    budgets = spend.core.budgets
    assert budgets.upstream_budget is not None
    assert budgets.upstream_budget.spent() == 1.0
    assert 0 < (budgets.upstream_budget.resets_in() or 0) <= 86_400
    assert target(task_budget_usd=1).upstream().core.budgets.has_budgets


def test_the_strict_rates_of_a_target_are_strict_quotas() -> None:
    strict = QuotaSettings(tpm=9, strict=True)
    settings = target(rpm=1, input_tpm=2, output_tpm=3, strict=True, models={"o3": strict}).upstream().core.settings
    assert [(quota.unit, quota.strict) for quota in settings.quotas] == [
        ("requests", False),
        ("input_tokens", False),
        ("output_tokens", True),
    ]
    assert settings.models == {"o3": (Quota(tokens=9, per="minute", strict=True),)}
    assert settings.has_strict_quota("o3")


def test_a_target_without_limits_is_learned() -> None:
    settings = target().upstream().core.settings
    assert (settings.quotas, settings.models, settings.max_concurrent) == ((), {}, None)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"name": "Open AI"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": 3}, "name"),
        ({"name": "v1"}, "name"),
        ({"provider": "opnai"}, "provider"),
        ({"rpm": 0}, "rpm"),
        ({"rpm": True}, "rpm"),
        ({"input_tpm": -1}, "input_tpm"),
        ({"output_tpm": 1.5}, "output_tpm"),
        ({"tpm": "many"}, "tpm"),
        ({"strict": True, "rpm": 5}, "strict"),
        ({"strict": 1, "tpm": 5}, "strict"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"budget_usd": 0}, "budget_usd"),
        ({"budget_usd": math.inf}, "budget_usd"),
        ({"tenant_budget_usd": math.nan}, "tenant_budget_usd"),
        ({"task_budget_usd": -1.0}, "task_budget_usd"),
        ({"max_wait": 0.0}, "max_wait"),
        ({"max_wait": None}, "max_wait"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"weights": {"acme": 0}}, "weights.acme"),
        ({"unpriced": "allow"}, "unpriced"),
    ],
)
def test_an_invalid_target_setting_is_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidSetting) as rejected:
        target(**wrong)
    assert vars(rejected.value)["name"] == name


def test_the_limits_of_a_group_of_models_are_checked_too() -> None:
    with pytest.raises(InvalidSetting, match="rpm=0"):
        QuotaSettings(rpm=0)


def test_a_price_is_at_least_0() -> None:
    with pytest.raises(InvalidPrice, match="mine"):
        target(prices={"mine": Price(input=-1, output=2)})


@pytest.mark.parametrize(
    "url", ["https://api.openai.com", "http://127.0.0.1:8000", "http://[::1]:8000/base", "https://h.example/v1beta/"]
)
def test_a_url_may_have_a_port_and_a_path(url: str) -> None:
    assert target(url=url).url == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("api.openai.com", "starts with neither"),
        ("ftp://api.openai.com", "starts with neither"),
        ("https://", "no host"),
        ("https://h.example:port", "not a URL"),
        ("https://h.example/a b", "not a URL"),
        ("https://h.example\n", "not a URL"),
        ("https://[::1", "not a URL"),
        ("https://h.example/?key=1", "'?'"),
        ("https://h.example/#there", "'#'"),
        ("https://h.example/v1/", "/v1"),
        ("https://h.example/openai/v1", "/v1"),
        (None, "not a URL"),
    ],
)
def test_an_invalid_url_is_rejected(url: Any, problem: str) -> None:
    with pytest.raises(InvalidSetting, match=r"https://api\.openai\.com") as rejected:
        target(url=url)
    assert problem in str(rejected.value)


def test_a_url_with_a_password_is_rejected_and_not_shown() -> None:
    with pytest.raises(InvalidSetting) as rejected:
        target(url="https://me:hush@h.example")
    assert "hush" not in str(rejected.value)
    assert "callers send their own keys" in str(rejected.value)


# --- the address ---


@pytest.mark.parametrize("listen", ["127.0.0.1:8787", "127.8.9.10:0", "localhost:1", "LOCALHOST:1", "[::1]:65535"])
def test_loopback_needs_no_token(listen: str) -> None:
    settings = gateway(listen=listen)
    assert settings.address.loopback
    assert settings.trust == "anyone"


@pytest.mark.parametrize("listen", ["0.0.0.0:8787", "[::]:8787", "10.0.0.1:80", "gateway.example:8787"])
def test_an_address_beyond_loopback_needs_a_token(listen: str) -> None:
    with pytest.raises(InvalidSetting, match="--token-env"):
        gateway(listen=listen)
    assert gateway(listen=listen, token_env="FOREBAY_TOKEN").trust == "token"


def test_an_address_is_a_host_and_a_port() -> None:
    address = gateway(listen="[::1]:8787").address
    assert (address.host, address.port) == ("::1", 8787)


@pytest.mark.parametrize(
    "listen", ["127.0.0.1", "8787", ":8787", "127.0.0.1:65536", "::1:8787", "[10.0.0.1", "[1]:80", "a b:80", None, 8787]
)
def test_an_invalid_address_is_rejected(listen: Any) -> None:
    with pytest.raises(InvalidSetting, match="HOST:PORT"):
        gateway(listen=listen)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"targets": ()}, "targets"),
        ({"targets": (target(), target())}, "targets"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"max_held_bytes": 0}, "max_held_bytes"),
        ({"max_body_bytes": 1000, "max_held_bytes": 999}, "max_held_bytes"),
        ({"max_header_bytes": "64k"}, "max_header_bytes"),
        ({"max_held_response_bytes": 0}, "max_held_response_bytes"),
        ({"max_connections": 0}, "max_connections"),
        ({"body_timeout": 0}, "body_timeout"),
        ({"drain_timeout": -1}, "drain_timeout"),
        ({"token_env": ""}, "token_env"),
        ({"token_file": 1}, "token_file"),
        ({"token_env": "A", "token_file": "b"}, "token_file"),
        ({"context": ContextSettings(trust="token")}, "context.trust"),
    ],
)
def test_an_invalid_gateway_setting_is_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidSetting) as rejected:
        gateway(**wrong)
    assert vars(rejected.value)["name"] == name


# --- trust ---


def test_trust_can_be_set() -> None:
    assert gateway(context=ContextSettings(trust="nobody")).trust == "nobody"
    assert gateway(context=ContextSettings(trust="token"), token_env="A").trust == "token"
    assert gateway(context=ContextSettings(trust="anyone"), token_env="A", listen="0.0.0.0:80").trust == "anyone"


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"trust": "everyone"}, "trust"),
        ({"tenant_headers": ("x user",)}, "tenant_headers"),
        ({"tenant_headers": ("",)}, "tenant_headers"),
        ({"tenant_headers": (1,)}, "tenant_headers"),
    ],
)
def test_an_invalid_context_setting_is_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidSetting) as rejected:
        ContextSettings(**wrong)
    assert vars(rejected.value)["name"] == name


@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "Cookie"])
def test_a_header_with_a_secret_cannot_name_the_tenant(header: str) -> None:
    with pytest.raises(InvalidSetting, match="without secrets"):
        ContextSettings(tenant_headers=("x-user-id", header))


# --- fallbacks ---


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({}, "model"),
        ({"model": ""}, "model"),
        ({"model": "m", "api_key_env": "KEY"}, "api_key_env"),
        ({"target": "t", "load_threshold": 0}, "load_threshold"),
        ({"target": "t", "load_threshold": 1.5}, "load_threshold"),
        ({"target": "t", "models": ""}, "models"),
        ({"target": 7}, "target"),
    ],
)
def test_an_invalid_fallback_setting_is_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidSetting) as rejected:
        FallbackSettings(**wrong)
    assert vars(rejected.value)["name"] == name


def chained(**leads: str) -> GatewaySettings:
    """Return settings with targets, each with a fallback to the one it names."""
    targets = [
        TargetSettings(name=name, url="http://x", fallback=(FallbackSettings(target=to),) if to else ())
        for name, to in leads.items()
    ]
    return GatewaySettings(targets=tuple(targets))


def test_fallbacks_lead_to_existing_targets_and_not_back() -> None:
    assert [target.name for target in make_targets(chained(a="b", b="c", c=""), {})] == ["a", "b", "c"]
    for leads in ({"a": "b"}, {"a": "a"}, {"a": "b", "b": "c", "c": "a"}):
        with pytest.raises(InvalidSetting, match="fallback"):
            chained(**leads)


def test_fallbacks_lead_to_targets_of_the_same_protocol() -> None:
    with pytest.raises(InvalidSetting, match="protocol"):
        make_targets(chained(openai="anthropic", anthropic=""), {})


# --- the token ---


def test_without_a_variable_or_a_file_there_is_no_token() -> None:
    assert gateway().token({}) is None


def test_a_token_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert gateway(token_env="MINE").token({"MINE": TOKEN}) == TOKEN
    assert gateway(token_file=str(file)).token({}) == TOKEN


@pytest.mark.parametrize("text", ["", " \n", "short", "with a space in the middle", "0123456789abcdé0"])
def test_an_unfit_token_is_rejected_and_not_shown(text: str) -> None:
    with pytest.raises(InvalidSecret, match="environment variable MINE") as rejected:
        gateway(token_env="MINE").token({"MINE": text})
    assert not text.strip() or text not in str(rejected.value)


def test_a_missing_token_is_reported_with_its_variable_or_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidSecret, match="MINE"):
        gateway(token_env="MINE").token({})
    with pytest.raises(InvalidSecret, match="No such file"):
        gateway(token_file=str(tmp_path / "token")).token({})
    with pytest.raises(InvalidSecret, match="directory"):
        gateway(token_file=str(tmp_path)).token({})
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    with pytest.raises(InvalidSecret, match="not UTF-8"):
        gateway(token_file=str(tmp_path / "binary")).token({})


# --- keys ---


def test_a_target_has_one_key_from_one_place() -> None:
    assert target(api_key_env="KEY").holds_key
    assert not target().holds_key
    with pytest.raises(InvalidSetting, match="left out if api_key_env is given"):
        target(api_key_env="KEY", api_key_file="key")
    with pytest.raises(InvalidSetting, match="not the key itself"):
        target(api_key_env="")


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        ("", "it is empty or not set"),
        ("two words", "the key alone"),
        ("sk-ü", "the key alone"),
        ("a\nb", "the key alone"),
    ],
)
def test_a_provider_key_that_cannot_be_sent_is_named_and_not_shown(variable: str, problem: str) -> None:
    with pytest.raises(InvalidProviderKey, match=problem) as caught:
        target(api_key_env="KEY").api_key({"KEY": variable})
    assert "target 'openai'" in str(caught.value)
    assert not variable or variable not in str(caught.value)
    assert target(api_key_env="KEY").api_key({"KEY": " sk-1\n"}) == "sk-1"


def test_with_issued_keys_it_may_listen_on_any_address() -> None:
    assert gateway(keys="sqlite:///keys.db", listen="0.0.0.0:8787").needs_key
    with pytest.raises(InvalidSetting, match="a loopback address"):
        gateway(keys="sqlite:///keys.db", require_key=False, listen="0.0.0.0:8787")
    assert not gateway(keys="sqlite:///keys.db", require_key=False, listen="0.0.0.0:8787", token_env="TOKEN").needs_key


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keys": "keys.db"}, "it does not begin with the name of a store"),
        ({"keys": "redis://:hidden@host/0"}, "kept in a SQLite file"),
        ({"keys": 7}, "it is a int"),
        ({"require_key": False}, "false only beside keys"),
        ({"require_key": "no", "keys": "sqlite:///keys.db"}, "true or false"),
    ],
)
def test_a_mistake_in_the_settings_of_keys_is_named(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidSetting, match=expected) as caught:
        gateway(**settings)
    assert "hidden" not in str(caught.value)


# --- tenants ---


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 257}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "ü"}, "name"),  # a header would not have it so
        ({"rpm": 0}, "rpm"),
        ({"tpm": True}, "tpm"),
        ({"max_concurrent": 1.5}, "max_concurrent"),
        ({"budget_usd": 0}, "budget_usd"),
        ({"max_wait": -1}, "max_wait"),
        ({"weight": 0}, "weight"),
        ({"priority": "urgent"}, "priority"),
        ({"max_priority": None}, "max_priority"),
    ],
)
def test_a_wrong_setting_of_a_tenant_is_rejected(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^TenantSettings was given {named}="):
        TenantSettings(**{"name": "acme", **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"tenants": (TenantSettings(name="a"), TenantSettings(name="a"))},
        {"response_headers": 1},
        {"access_log": "xml"},
        {"access_log_to": ""},
        {"access_log_to": "a\0b"},
    ],
)
def test_a_wrong_setting_of_what_is_shown_is_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(wrong))):
        GatewaySettings(targets=(TargetSettings(name="openai", url="https://h.example"),), **wrong)


@pytest.mark.parametrize(
    "settings",
    [
        lambda key: target(api_key_env=key),
        lambda key: KeySettings(api_key_env=key),
        lambda key: FallbackSettings(target="backup", api_key_env=key),
        lambda key: gateway(token_env=key),
    ],
)
def test_a_key_in_the_place_of_a_variable_is_refused_and_not_shown(settings: Callable[[str], object]) -> None:
    with pytest.raises(InvalidSetting, match="not the key itself") as rejected:
        settings("sk-proj-hunter2")
    assert "hunter2" not in str(rejected.value)
