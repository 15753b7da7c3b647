"""The bugs of ``tests/mutation/bugs.py`` that storms find, each with a seed that finds it.

``python -m tests.simulation.found_by_storms NAME`` injects a bug into its process, runs the storm, and prints what that
finds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Final, TypeAlias

from tests.mutation import bugs
from tests.simulation import (
    blame_storm,
    control_storm,
    conversation_mix,
    fair_share,
    hook_storm,
    money_storm,
    task_storm,
)

Bug: TypeAlias = Callable[[], None]

FOUND: Final[dict[Bug, tuple[ModuleType, int]]] = {
    # FOUND
}
"""By bug, the storm and the first seed known that finds it."""


def run(bug: Bug) -> BaseException | None:
    """Return what the storm of a bug finds in this process; None if it finds nothing."""
    storm, seed = FOUND[bug]
    try:
        storm.run(seed)
    except BaseException as failure:  # noqa: BLE001 - whatever it is
        return failure
    return None


if __name__ == "__main__":
    logging.disable()
    (chosen,) = (bug for bug in FOUND if bug.__name__ == sys.argv[1])
    chosen()
    found = run(chosen)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    print("nothing" if found is None else f"{type(found).__name__}: {found}")
