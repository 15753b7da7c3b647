"""The estimated size of payloads and results."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.supervisor.payload_size import estimated_bytes

MESSAGES = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y" * 2000, "calls": [1, 2.0]}]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("x" * 100, 100),
        ({"output": "x" * 100}, 100),
        ({"messages": MESSAGES, "usage": {"requests": 3}, "agent": None}, 3000),
        ((MESSAGES, [MESSAGES], b"z" * 500), 6500),
        ([{"content": {"x" * 1000, "y" * 1000}}], 2000),
        ([{"content": bytearray(2000)}], 2000),
        ({str(number): f"{number:0100}" for number in range(100)}, 10_000),
        ([[f"{number:0100}"] for number in range(60)], 6_000),
    ],
)
def test_a_value_takes_the_bytes_of_its_content_and_some_for_each_part(value: Any, content: int) -> None:
    assert content <= estimated_bytes(value) <= 3 * content + 2500


def test_a_value_that_holds_itself_has_a_size() -> None:
    value: list[Any] = ["x" * 1000]
    value.append(value)
    assert 1000 <= estimated_bytes(value) < 10_000


def test_scalars_take_nothing() -> None:
    assert [estimated_bytes(value) for value in (None, True, 1, 2.0)] == [0, 0, 0, 0]
