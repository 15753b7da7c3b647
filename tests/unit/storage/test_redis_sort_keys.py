"""Numbers sort as the texts do that Redis orders by their bytes."""

from __future__ import annotations

import pytest

from forebay.storage.redis_sort_keys import from_sortable, quoted, sortable

NUMBERS = [0.0, 1e-300, 0.1, 1.0, 2.0**53 + 2, 1.7e9 + 0.123456789, 1e300]


@pytest.mark.parametrize("number", NUMBERS + [-each for each in NUMBERS])
def test_a_number_is_the_same_after_it_was_made_to_sort(number: float) -> None:
    assert from_sortable(sortable(number)) == number


def test_numbers_sort_as_their_texts_do() -> None:
    numbers = sorted([*NUMBERS, *(-each for each in NUMBERS), float("inf"), float("-inf")])
    texts = [sortable(number) for number in numbers]
    assert texts == sorted(texts)
    assert len(set(texts)) == len(set(numbers))


def test_a_quoted_text_has_no_separator() -> None:
    assert quoted("a|b{c}") == "a%7Cb%7Bc%7D"
