"""docs/providers.md is the table for people: its rows are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from tests.unit.upstream.providers.test_request import PROVIDERS

from forebay.interfaces import Outcome
from forebay.upstream.providers import ErrorKind, profile_for

PAGE = Path(__file__).parents[4] / "docs" / "providers.md"
SAID = {"nothing": Outcome.IGNORED, "overload": Outcome.OVERLOAD, "fault": Outcome.FAULT}


def rows(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_provider_has_a_row_that_tells_its_rules() -> None:
    told = {name: row for row in rows("The table") for name in re.findall(r"`([^`]+)`", row[0])}
    assert sorted(told) == sorted(PROVIDERS)
    for name, row in told.items():
        rules = profile_for(name)
        assert row[5].startswith(f"{rules.bytes_per_token:g} bytes")
        assert (row[2] == "counts") == rules.cached_input_counts
        assert row[4].startswith(("asked for", "the same")) == rules.supports_include_usage


def test_each_meaning_has_a_row_that_tells_what_it_entails() -> None:
    told = {row[0].strip("`"): row for row in rows("What each error means")}
    assert sorted(told) == sorted(meaning.name for meaning in ErrorKind if meaning is not ErrorKind.SUCCESS)
    for name, row in told.items():
        meaning = ErrorKind[name]
        assert SAID[row[3]] is meaning.outcome
        assert row[4] == ("" if not meaning.retryable else "yes" if meaning.uses_attempt else "no")
