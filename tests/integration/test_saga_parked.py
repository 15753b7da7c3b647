"""A compensation that fails is tried again; then its saga is parked, `forebay saga ls` shows it, and it is retried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.support.effect_server import EffectServer
from tests.support.killed_sagas import FAILURES, Life, SagaProcesses
from tests.support.saga_logs import DURABLE_LOGS, LogBackend
from typer.testing import CliRunner

from forebay.cli.app import app

pytestmark = pytest.mark.blocks

ATTEMPTS = 3  # at a compensation, before it is parked


@pytest.fixture
def processes() -> Iterator[SagaProcesses]:
    with SagaProcesses() as processes:
        yield processes


def forebay(*arguments: str) -> str:
    """Run a command, and return what it has printed."""
    result = CliRunner().invoke(app, ["saga", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("backend", DURABLE_LOGS, ids=str)
def test_a_compensation_that_fails_is_retried_then_parked_and_seen_and_goes_on_when_a_person_says_so(
    backend: LogBackend, processes: SagaProcesses, tmp_path: Path
) -> None:
    url, server = backend.fast_url(tmp_path), EffectServer(tmp_path / "effects")
    life = Life(url=url, effects=str(tmp_path / "effects"), saga_id="the saga", name="chain", how="undo fails")
    for number in range(FAILURES // ATTEMPTS):
        assert not processes.run(msgspec.structs.replace(life, number=number, submits=number == 0))
        assert server.count("stumble", "undo research") == (number + 1) * ATTEMPTS
        (shown,) = json.loads(forebay("ls", url, "--json"))
        assert (shown["saga_id"], shown["state"]) == ("the saga", "parked")
        assert "the compensation of step 'research' has failed 3 times" in shown["why"]
        assert list(server.effects().values()) == ["research"]
        forebay("retry", url, "the saga")
    assert not processes.run(msgspec.structs.replace(life, number=5, submits=False))
    assert server.effects() == {}
    assert json.loads(forebay("ls", url, "--json")) == []
    (shown,) = json.loads(forebay("ls", url, "--json", "--all"))
    assert shown["state"] == "compensated"
