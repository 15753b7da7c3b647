"""What a SIGHUP does to a gateway."""

from __future__ import annotations

import pytest

from forebay.gateway.server import effect_of_hang_up


@pytest.mark.parametrize(
    ("reloads", "ignored", "terminal_closed", "effect"),
    [
        (False, False, False, "stop"),
        (False, False, True, "stop"),
        (False, True, True, "none"),
        (True, False, False, "reload"),
        (True, True, False, "reload"),
        (True, False, True, "stop"),
        (True, True, True, "none"),
    ],
)
def test_a_hang_up_reloads_or_stops(
    reloads: bool,  # noqa: FBT001 - parameters of the test
    ignored: bool,  # noqa: FBT001
    terminal_closed: bool,  # noqa: FBT001
    effect: str,
) -> None:
    assert effect_of_hang_up(reloads=reloads, ignored=ignored, terminal_closed=terminal_closed) == effect
