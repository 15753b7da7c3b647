"""The HTTP proxy through which a provider is reached."""

from __future__ import annotations

import pytest

from forebay.errors import InvalidSetting
from forebay.gateway.connections.http_proxy import http_proxy_for, without_password

OPENAI = "https://api.openai.com"


def proxy(url: str = OPENAI, **environment: str) -> str | None:
    return http_proxy_for(url, environment)


def test_without_a_variable_there_is_no_proxy() -> None:
    assert proxy() is None
    assert proxy(PATH="/bin", HTTPS_PROXY="") is None


def test_the_proxy_is_that_of_the_scheme_or_of_all_schemes() -> None:
    assert proxy(HTTPS_PROXY="http://proxy:3128", HTTP_PROXY="http://other:1") == "http://proxy:3128"
    assert proxy("http://llm.example", HTTPS_PROXY="http://proxy:3128") is None
    assert proxy(ALL_PROXY="proxy:3128") == "http://proxy:3128"


def test_lower_case_outweighs_upper_case() -> None:
    assert proxy(HTTPS_PROXY="http://a:1", https_proxy="http://b:2") == "http://b:2"


def test_hosts_in_no_proxy_are_reached_directly() -> None:
    https = {"HTTPS_PROXY": "http://proxy:3128"}
    assert proxy(**https, NO_PROXY="openai.com") is None
    assert proxy(**https, NO_PROXY="*") is None
    assert proxy(**https, NO_PROXY="example.com") == "http://proxy:3128"


@pytest.mark.parametrize("url", ["http://127.0.0.1:11434", "http://localhost:8000", "http://[::1]:8000"])
def test_this_machine_is_reached_directly(url: str) -> None:
    assert proxy(url, HTTP_PROXY="http://proxy:3128") is None


@pytest.mark.parametrize("wrong", ["socks5://user:hidden@proxy:1080", "https://proxy", "http://", "http://proxy:port"])
def test_an_invalid_proxy_is_rejected_and_its_password_not_shown(wrong: str) -> None:
    with pytest.raises(InvalidSetting, match="HTTPS_PROXY") as rejected:
        proxy(HTTPS_PROXY=wrong)
    assert "hidden" not in str(rejected.value)


def test_a_proxy_that_is_not_needed_is_not_checked() -> None:
    assert proxy(HTTPS_PROXY="socks5://proxy", NO_PROXY="api.openai.com") is None


def test_a_proxy_is_shown_without_its_password() -> None:
    assert without_password("http://me:hidden@proxy:3128") == "http://***@proxy:3128"
    assert without_password("http://proxy:3128") == "http://proxy:3128"
