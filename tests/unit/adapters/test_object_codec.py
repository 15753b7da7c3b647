"""Objects of listed classes as plain data."""

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

BOUND = 1 << 20


class Message:
    def __init__(self, who: str, what: Any) -> None:
        if not isinstance(who, str):
            raise TypeError(who)
        self.who, self.what = who, what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and (self.who, self.what) == (other.who, other.what)

    def __hash__(self) -> int:
        return hash(self.who)


class DerivedMessage(Message):
    pass


CODEC = ObjectCodec([SerializableClass(Message, vars, lambda fields: Message(**fields))])

NAMES = st.sampled_from(["a", "b c", "__forebay__", "parts"])
VALUES = st.recursive(
    st.none() | st.integers(-5, 5) | st.sampled_from(["dict", "Message", "parts"]),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(NAMES, inner)
        | st.builds(Message, st.text("ab"), inner)
    ),
    max_leaves=20,
)


@given(value=VALUES)
def test_values_are_loaded_equal_whatever_names_they_hold(value: Any) -> None:
    envelope = encode_task(Task("work"), CODEC.dump(value), bound=BOUND)
    assert CODEC.load(decode_task(envelope).payload) == value


def test_an_object_of_a_derived_class_is_left_as_it_is_and_so_rejected() -> None:
    with pytest.raises(NotSerializable) as caught:
        encode_task(Task("work"), CODEC.dump([DerivedMessage("me", "la")]), bound=BOUND)
    assert (caught.value.path, caught.value.type) == ("payload[0]", "DerivedMessage")


def test_a_value_that_contains_itself_is_rejected() -> None:
    cycle: list[Any] = []
    cycle.append(Message("me", cycle))
    with pytest.raises(NotSerializable, match="within itself"):
        encode_task(Task("work"), CODEC.dump(cycle), bound=BOUND)


@pytest.mark.timeout(5)
def test_a_part_that_is_referenced_many_times_is_converted_once() -> None:
    shared: list[Any] = ["ha"]
    for _ in range(60):
        shared = [shared, shared]
    assert len(CODEC.dump(shared)) == 2


@pytest.mark.parametrize(
    ("plain", "path"),
    [
        ([{"__forebay__": "Popen", "parts": {"args": "sk-secret"}}], "[0]"),
        ({"said": {"__forebay__": "Message", "parts": {"who": 1, "what": "sk-secret"}}}, ".said"),
        ({"said": {"__forebay__": "Message", "parts": {"sk-secret": 1}}}, ".said"),
        ({"__forebay__": "Message"}, ""),
        ({"__forebay__": "Message", "parts": "sk-secret"}, ""),
        ({"__forebay__": ["Message"], "parts": {}}, ""),
        ({"__forebay__": "Message", "parts": {"who": "a", "what": {"__forebay__": "x", "parts": {}}}}, ".what"),
    ],
)
def test_stored_data_that_describe_no_known_object_are_rejected(plain: Any, path: str) -> None:
    with pytest.raises(TypeMismatch) as caught:
        CODEC.load(plain)
    assert caught.value.path == path
    assert "secret" not in caught.value.reason
