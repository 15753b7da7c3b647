"""The memory of a process, as another process reads it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from demo.side_process import resident_mb


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_process_is_weighed_from_outside() -> None:
    measured = resident_mb(os.getpid())
    assert measured is not None
    now, peak = measured
    assert 1 < now <= peak


def test_a_process_that_is_not_there_weighs_nothing_known() -> None:
    assert resident_mb(2**22 + 1) is None
