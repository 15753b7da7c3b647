"""Whatever is done to whole houses, in whatever order and at the same moment: they end in order, and nobody waits."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from tests.simulation import supervisor_scripts as houses

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@settings(max_examples=2 * settings().max_examples, suppress_health_check=[HealthCheck.too_slow])
@given(script=houses.SCRIPTS)
def test_every_ticket_ends_once_every_slot_comes_back_and_nobody_waits_for_ever(
    script: houses.SupervisorScript,
) -> None:
    houses.run_script(script)
