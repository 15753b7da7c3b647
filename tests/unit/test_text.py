"""Numbers with units, as messages show them."""

from __future__ import annotations

import math

import pytest

from forebay._text import error_text, format_bytes, format_duration, header_value


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000_25, "250 us"),
        (0.25, "250 ms"),
        (0.999_4, "999 ms"),
        (0.000_999_9, "1 ms"),
        (0.999_9, "1 s"),
        (1, "1 s"),
        (1.5, "1.5 s"),
        (82.4816, "82.5 s"),
        (120, "2 min"),
        (999.9, "16.7 min"),
        (3600, "1 h"),
        (75_101.6, "20.9 h"),
        (86_400, "24 h"),
        (8.64e4 * 30, "30 days"),
        (8.64e4 * 12_345, "12,345 days"),
        (-90, "-90 s"),
        (math.inf, "an unlimited time"),
        (math.nan, "an unknown time"),
        (-math.inf, "an unknown time"),
    ],
)
def test_a_duration_is_shown_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1_500, "1.5 kB"),
        (999_600, "1 MB"),
        (16_000_000, "16 MB"),
        (2.5e9, "2.5 GB"),
        (1e13, "10 TB"),
        (1e16, "10,000 TB"),
    ],
)
def test_a_number_of_bytes_is_shown_in_the_unit_that_reads_best(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_the_text_of_an_error_is_bounded_and_valid_unicode() -> None:
    for text in ("short", "\udc80" * 9_000, "x" * 1_000_000):
        shown = error_text(text)
        assert shown.encode()
        assert len(shown) <= 10_000
        assert error_text(shown) == shown
    assert error_text("short") == "short"
    assert error_text("half \udc80") == "half \\udc80"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pool:research", "pool:research"),
        (" a\r\nset-cookie: x\x00\x7f", "a  set-cookie: x"),
        ("pool:übersetzen", "pool:\\xfcbersetzen"),
        ("研\ud800", "\\u7814\\ud800"),
    ],
)
def test_a_header_can_be_sent_whatever_the_text(text: str, value: str) -> None:
    assert header_value(text) == value
