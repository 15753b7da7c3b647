"""Random scripts of operations on supervisors: every task ends once, and no caller waits endlessly."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from tests.simulation import supervisor_scripts

pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread


@settings(max_examples=2 * settings().max_examples, suppress_health_check=[HealthCheck.too_slow])
@given(script=supervisor_scripts.SCRIPTS)
def test_every_ticket_ends_once_every_slot_is_returned_and_no_caller_waits_endlessly(
    script: supervisor_scripts.SupervisorScript,
) -> None:
    supervisor_scripts.run_script(script)
