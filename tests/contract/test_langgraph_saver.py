"""The contract of LangGraph's checkpointers, on every place of state: LangGraph's own suite, and what it leaves out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability
from tests.support.state_backends import BACKENDS, StateBackend

from forebay.adapters.langgraph import ShardedSaver
from forebay.state import ShardedState


@pytest.fixture(params=BACKENDS, ids=str)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


@pytest.mark.parametrize("capability", Capability, ids=lambda each: each.value)
async def test_the_suite_of_langgraph_passes(urls: list[str], capability: Capability) -> None:
    async def saver() -> AsyncIterator[BaseCheckpointSaver[str]]:
        async with await ShardedState.connect(*urls) as state:
            yield ShardedSaver(state)

    report = await validate(checkpointer_test(name="sharded")(saver), capabilities={capability.value})
    result = report.results[capability.value]
    assert result.failures == []
    assert result.detected
    assert result.tests_passed > 3
