"""The table of docs/frameworks has what the contract suite measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.sample import Sample

if not INSTALLED:
    pytest.skip("frameworks run in an environment of their own: scripts/test.sh makes it", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs" / "frameworks" / "index.md"


def test_the_table_has_the_measured_facts(sample: Sample) -> None:
    facts = sample.facts
    cells = (
        *(sample.name, facts.stops_at, f"bound 1, direct {facts.calls_if_direct}"),
        *("yes" if facts.counts_usage else "no", str(facts.threads_left), facts.progress),
    )
    assert f"| {' | '.join(cells)} |" in PAGE.read_text().splitlines()
