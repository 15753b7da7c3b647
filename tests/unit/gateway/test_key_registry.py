"""The issued keys as a running gateway knows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.issued_keys import IssuedKeys

from forebay.gateway.key_file import KeyFile
from forebay.gateway.key_registry import KeyRegistry


@pytest.mark.blocks  # another process changes the file
async def test_the_limits_of_a_key_that_changes_while_its_first_call_arrives_are_those_of_the_file(
    tmp_path: Path,
) -> None:
    keys = IssuedKeys(tmp_path / "keys.db")
    text = keys.add("writer", budget_usd=5.0)
    registry = KeyRegistry(keys.path)
    registry.load()
    found = registry.find(text)  # and the body of the call has not arrived
    with KeyFile(keys.path) as file:
        file.update("writer", {"budget_usd": 1.0})
    await registry.refresh()
    budget = registry.limits_of(found).budget
    assert budget is not None
    assert budget.usd == 1.0
