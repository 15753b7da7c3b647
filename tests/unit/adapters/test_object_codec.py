"""Objects of listed classes in plain data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.adapters import ObjectCodec, SerializableClass
from forebay.errors import NotSerializable
from forebay.interfaces import TypeMismatch
from forebay.overflow import decode_task, encode_task
from forebay.task import Task

ROOM = 1 << 20


class Said:
    def __init__(self, who: str, what: Any) -> None:
        if not isinstance(who, str):
            raise TypeError(who)
        self.who, self.what = who, what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Said) and (self.who, self.what) == (other.who, other.what)

    def __hash__(self) -> int:
        return hash(self.who)


class Sung(Said):
    pass


CODEC = ObjectCodec([SerializableClass(Said, vars, lambda parts: Said(**parts))])

NAMES = st.sampled_from(["a", "b c", "__forebay__", "parts"])
VALUES = st.recursive(
    st.none() | st.integers(-5, 5) | st.sampled_from(["dict", "Said", "parts"]),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(NAMES, inner)
        | st.builds(Said, st.text("ab"), inner)
    ),
    max_leaves=20,
)


@given(value=VALUES)
def test_values_come_back_equal_whatever_the_names_in_them(value: Any) -> None:
    envelope = encode_task(Task("work"), CODEC.dump(value), bound=ROOM)
    assert CODEC.load(decode_task(envelope).payload) == value


def test_an_object_of_a_derived_class_is_left_as_it_is_and_so_refused() -> None:
    with pytest.raises(NotSerializable) as caught:
        encode_task(Task("work"), CODEC.dump([Sung("me", "la")]), bound=ROOM)
    assert (caught.value.path, caught.value.type) == ("payload[0]", "Sung")


def test_what_holds_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(Said("me", knot))
    with pytest.raises(NotSerializable, match="within itself"):
        encode_task(Task("work"), CODEC.dump(knot), bound=ROOM)


@pytest.mark.timeout(5)
def test_what_is_held_many_times_over_is_walked_once() -> None:
    laugh: list[Any] = ["ha"]
    for _ in range(60):
        laugh = [laugh, laugh]
    assert len(CODEC.dump(laugh)) == 2


@pytest.mark.parametrize(
    ("plain", "path"),
    [
        ([{"__forebay__": "Popen", "parts": {"args": "sk-secret"}}], "[0]"),
        ({"said": {"__forebay__": "Said", "parts": {"who": 1, "what": "sk-secret"}}}, ".said"),
        ({"said": {"__forebay__": "Said", "parts": {"sk-secret": 1}}}, ".said"),
        ({"__forebay__": "Said"}, ""),
        ({"__forebay__": "Said", "parts": "sk-secret"}, ""),
        ({"__forebay__": ["Said"], "parts": {}}, ""),
        ({"__forebay__": "Said", "parts": {"who": "a", "what": {"__forebay__": "x", "parts": {}}}}, ".what"),
    ],
)
def test_what_stands_for_no_known_object_is_a_misfit(plain: Any, path: str) -> None:
    with pytest.raises(TypeMismatch) as caught:
        CODEC.load(plain)
    assert caught.value.path == path
    assert "secret" not in caught.value.reason
