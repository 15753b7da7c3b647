"""The table of endpoints: how the price of each request is found, in whatever spelling a server accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forebay.upstream.providers.endpoints import (
    ENDPOINT_RULES,
    Billing,
    Endpoint,
    EndpointRule,
    find_rule,
    normalize_path,
)

PAGE = Path(__file__).parents[4] / "docs/quotas.md"
PRICED = [rule for rule in ENDPOINT_RULES if rule.billing in (Billing.USAGE, Billing.CHARACTERS)]


def example(rule: EndpointRule) -> str:
    return "/v1" + re.sub(r"\{[a-z_]+\}", "id_1", rule.path).replace("*", "id_1/rest")


@pytest.mark.parametrize("rule", ENDPOINT_RULES, ids=lambda rule: rule.path)
def test_each_row_is_found_by_its_path(rule: EndpointRule) -> None:
    assert find_rule(example(rule)) == rule


@pytest.mark.parametrize("rule", PRICED, ids=lambda rule: rule.path)
@pytest.mark.parametrize(
    "spelled",
    [
        lambda path: path + "/",
        lambda path: path.upper(),
        lambda path: path.replace("/", "//"),
        lambda path: "/v1/." + path.removeprefix("/v1"),
        lambda path: "/v1/files/.." + path.removeprefix("/v1"),
        lambda path: "/" + path[1:].replace("/", "%2F"),
        lambda path: "/" + path[1:].replace("/", "%252f"),
        lambda path: path.replace("/", "\\"),
        lambda path: path + ";version=1",
        lambda path: path + "%3Fx=1",
        lambda path: path + "%20",
        lambda path: "".join(f"%{ord(letter):02x}" if letter.isalpha() else letter for letter in path),
        lambda path: "/some/proxy" + path,
        lambda path: path.replace("/v1", "/openai/deployments/mine"),
    ],
    ids=range(14),
)
def test_a_priced_endpoint_is_priced_in_any_spelling(rule: EndpointRule, spelled: object) -> None:
    assert callable(spelled)
    assert find_rule(spelled("/v1" + rule.path)).endpoint is rule.endpoint


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/files",  # a lenient server may stop at the ending it knows
        "/v1/messages/moderations",
        "/v1/responses/resp_1/conversations",
        "/v1/chat/completions2",
        "/v1beta/models/gemini-2.5-pro:generateContent",
        "/v1/rerank",
        "/v1/threads/t/messages",
        "/v1/containers/c/files",
        "/v1/%25252525252Fchat",
        "",
        "/",
    ],
)
def test_any_other_path_has_no_price(path: str) -> None:
    assert find_rule(path).billing is Billing.UNPRICED


def test_a_path_is_compared_as_the_most_lenient_server_reads_it() -> None:
    assert normalize_path("/V1//./x/../Chat%2fCompletions;a=b/") == "/v1/chat/completions"


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text()
    for rule in ENDPOINT_RULES:
        assert f"| `{rule.path}` | {rule.billing.value} | {rule.reason} |" in page
    assert page.count("| rejected under a budget |") == 0
    rows = re.findall(r"^\| `/[^|]*\|", page, re.MULTILINE)
    assert len(rows) == len(ENDPOINT_RULES), "a row that the table does not have"


def test_only_known_endpoints_are_read() -> None:
    assert {rule.endpoint for rule in PRICED} == set(Endpoint) - {
        Endpoint.MODELS,
        Endpoint.COUNT_TOKENS,
        Endpoint.OTHER,
    }
