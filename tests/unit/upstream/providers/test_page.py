"""docs/providers.md shows the tables of the code."""

from __future__ import annotations

import re

from tests.support.provider_page import COMMAND, PAGE, updated
from tests.unit.upstream.providers.test_request import PROVIDERS

from forebay.upstream.providers import profile_for
from forebay.upstream.providers.classify import ERROR_RULES, ErrorKind


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_provider_has_a_row_that_shows_its_profile() -> None:
    shown = {name: row for row in rows("The table") for name in re.findall(r"`([^`]+)`", row[0])}
    assert sorted(shown) == sorted(PROVIDERS)
    for name, row in shown.items():
        profile = profile_for(name)
        assert row[5].startswith(f"{profile.bytes_per_token:g} bytes")
        assert (row[2] == "counts") == profile.cached_input_counts
        assert row[4].startswith(("asked for", "the same")) == profile.supports_include_usage


def test_the_error_tables_are_those_of_the_code() -> None:
    page = PAGE.read_text()
    assert page == updated(page), f"docs/providers.md is out of date: {COMMAND} rewrites it"


def test_each_error_kind_has_a_rule() -> None:
    assert set(ERROR_RULES) == set(ErrorKind)
