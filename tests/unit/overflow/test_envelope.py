"""Envelopes: a value is decoded equal and of the same types, or its encoding is rejected at submit."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import enum
import math
from collections import OrderedDict, UserDict, namedtuple
from decimal import Decimal
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forebay import clock
from forebay.errors import NotSerializable, PayloadTooLarge
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_result, decode_task, encode_result
from forebay.overflow import encode_task as encode_task_of
from forebay.overflow.envelope import VERSION, _Envelope
from forebay.task import Deadline, Estimate, Priority, Task

BOUND = 1 << 20  # bytes

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
PLAIN_DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=30,
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def encode_task(task: Task, *, bound: int) -> bytes:
    """Encode a task as a supervisor does without a codec."""
    return encode_task_of(task, task.payload, bound=bound)


def same(one: Any, other: Any) -> bool:
    """Return whether they are equal and of the same types: 1, 1.0 and True differ."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def rejection(payload: Any, *, bound: int = BOUND) -> NotSerializable:
    with pytest.raises(NotSerializable) as caught:
        encode_task(Task("research", payload, task_id="t"), bound=bound)
    return caught.value


# --- round trips ------------------------------------------------------------------------------------------------------


@given(payload=PLAIN_DATA)
def test_a_payload_is_decoded_equal(payload: Any) -> None:
    task = Task("research", payload)
    assert same(decode_task(encode_task(task, bound=BOUND)).payload, payload)


@given(
    task=st.builds(
        Task,
        NAMES,
        task_id=NAMES,
        priority=st.sampled_from(Priority),
        timeout=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.integers(1, 10**9),
        deadline=st.none() | st.builds(Deadline, st.floats(1e11, 1e300) | st.integers(10**11, 10**15)),
        spill=st.booleans(),
        durable=st.booleans(),
        key=st.none() | NAMES,
        tenant=NAMES,
        thread_id=st.none() | NAMES,
        estimate=st.none()
        | st.builds(
            Estimate,
            calls=st.integers(0, 10**6),
            input_tokens=st.integers(0, 2**64 - 1),
            output_tokens=st.integers(0, 10**6),
        ),
    )
)
def test_every_field_of_a_task_is_decoded_equal(task: Task) -> None:
    assert decode_task(encode_task(task, bound=BOUND)) == task


def test_the_envelope_has_every_field_of_a_task() -> None:
    decided_at_submit = {"on_busy"}
    stored = set(_Envelope.__struct_fields__) - {"version", "context"}
    assert set(Task.__struct_fields__) - decided_at_submit == stored


def test_tuples_and_lists_are_decoded_as_such() -> None:
    assert same(decode_task(encode_task(Task("research", (1, [(2,)])), bound=BOUND)).payload, (1, [(2,)]))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.0])
def test_special_floats_are_decoded_as_they_were(number: float) -> None:
    (back,) = decode_task(encode_task(Task("research", [number]), bound=BOUND)).payload
    assert msgspec.msgpack.encode(back) == msgspec.msgpack.encode(number)


def test_a_task_whose_deadline_has_passed_since_is_decoded() -> None:
    task = Task("research", deadline=Deadline.within(60))
    envelope = encode_task(task, bound=BOUND)
    with mock.patch.object(clock, "wall_time", return_value=clock.wall_time() + 3600):
        late = decode_task(envelope)
        assert late == task
        assert late.deadline is not None
        assert late.deadline.remaining() < 0


def test_a_name_that_is_an_enum_is_encoded_as_its_text() -> None:
    class Kind(enum.StrEnum):
        RESEARCH = "research"

    task = decode_task(encode_task(Task(Kind.RESEARCH), bound=BOUND))
    assert task.task_type == "research"
    assert type(task.task_type) is str


# --- rejections ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    x: int = 1


class Structured(msgspec.Struct):
    x: int = 1


class Colour(enum.IntEnum):
    RED = 1


Pair = namedtuple("Pair", "x y")  # noqa: PYI024 - the plain kind is what people have


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        (Plain(), "Plain"),
        (Structured(), "Structured"),
        (Colour.RED, "Colour"),
        (Pair(1, 2), "Pair"),
        (OrderedDict(), "OrderedDict"),
        (UserDict(), "UserDict"),
        ({1}, "set"),
        (bytearray(b"x"), "bytearray"),
        (dt.datetime(2025, 1, 1, tzinfo=dt.UTC), "datetime"),
        (Decimal(1), "Decimal"),
        (1j, "complex"),
        (len, "builtin_function_or_method"),
        (2**64, "int beyond 64 bits"),
        (-(2**63) - 1, "int beyond 64 bits"),
        ("\ud800", "str that is not valid Unicode"),
        ({1: "x"}, "dict with a key of type int"),
        ({None: "x"}, "dict with a key of type NoneType"),
        ({"\ud800": "x"}, "dict with a key that is not valid Unicode"),
    ],
)
def test_a_value_that_would_not_be_decoded_equal_is_rejected(value: Any, kind: str) -> None:
    rejected = rejection({"messages": [0, {"content": value}]})
    assert rejected.task_id == "t"
    assert rejected.path == "payload.messages[1].content"
    assert rejected.__dict__["type"] == kind
    assert rejection(value).path == "payload"
    with pytest.raises(NotSerializable) as caught:
        encode_result([value], task_id="t", bound=BOUND)
    assert (caught.value.path, caught.value.type) == ("result[0]", kind)


def test_a_path_shows_names_but_no_content() -> None:
    assert rejection({"a b": [object()]}).path == "payload[...][0]"
    assert rejection({"s" * 41: object()}).path == "payload[...]"
    assert "secret" not in str(rejection({"x": [object(), "secret"], "sk-secret": 1}))


def test_a_payload_that_contains_itself_is_rejected() -> None:
    cycle: list[Any] = []
    cycle.append({"deeper": cycle})
    assert "within itself" in rejection(cycle).__dict__["type"]
    wide: list[Any] = [0] * 1000
    wide.append(wide)
    assert "within itself" in rejection(wide).__dict__["type"]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_nesting_is_bounded() -> None:
    assert decode_task(encode_task(Task("research", nested(100)), bound=BOUND)).payload == nested(100)
    assert rejection(nested(101)).path == "payload" + "[0]" * 100


def test_a_payload_is_bounded_in_bytes() -> None:
    with pytest.raises(PayloadTooLarge) as caught:
        encode_task(Task("research", b"x" * 998, task_id="t"), bound=1000)
    assert (caught.value.size, caught.value.bound) == (1001, 1000)
    assert len(encode_task(Task("research", b"x" * 997), bound=1000)) > 1000  # the bound is the payload's alone
    with pytest.raises(PayloadTooLarge):
        encode_result(b"x" * 999, task_id="t", bound=1000)


@pytest.mark.timeout(5)
def test_a_payload_with_exponentially_many_references_is_too_large_and_not_walked_to_its_end() -> None:
    shared: list[Any] = ["ha"]
    for _ in range(60):
        shared = [shared, shared]  # 2**60 of them
    with pytest.raises(PayloadTooLarge):
        encode_task(Task("research", shared), bound=10_000)


@pytest.mark.parametrize("field", ["task_type", "task_id", "key", "tenant", "thread_id"])
def test_a_name_that_is_not_unicode_is_rejected(field: str) -> None:
    fields: dict[str, Any] = {"task_type": "research", field: "\ud800"}
    with pytest.raises(NotSerializable) as caught:
        encode_task(Task(**fields), bound=BOUND)
    assert caught.value.path == field


def test_an_estimate_beyond_64_bits_is_rejected() -> None:
    with pytest.raises(NotSerializable) as caught:
        encode_task(Task("research", estimate=Estimate(input_tokens=2**64)), bound=BOUND)
    assert caught.value.path == "estimate"


# --- results ---------------------------------------------------------------------------------------------------------


@given(value=PLAIN_DATA)
def test_a_result_is_decoded_equal(value: Any) -> None:
    assert same(decode_result(encode_result(value, task_id="t", bound=BOUND)), value)


# --- other versions, damage ------------------------------------------------------------------------------------------


def rewritten(envelope: bytes, **changes: Any) -> bytes:
    items = msgspec.msgpack.decode(envelope)
    if "version" in changes:
        items[0] = changes["version"]
    return msgspec.msgpack.encode(items + changes.get("more", []))


TASK = encode_task(Task("research", {"topic": "rivers"}), bound=BOUND)
RESULT = encode_result({"topic": "rivers"}, task_id="t", bound=BOUND)


def test_a_newer_version_is_named() -> None:
    for decode, data in ((decode_task, TASK), (decode_result, RESULT)):
        with pytest.raises(EnvelopeTooNew, match="Upgrade") as caught:
            decode(rewritten(data, version=VERSION + 1))
        assert (caught.value.version, caught.value.known) == (VERSION + 1, VERSION)


def test_a_newer_version_is_named_however_different_it_is() -> None:
    for decode in (decode_task, decode_result):
        with pytest.raises(EnvelopeTooNew):
            decode(msgspec.msgpack.encode([VERSION + 1, {"all": "else"}]))


def test_fields_added_at_the_end_are_ignored() -> None:
    assert decode_task(rewritten(TASK, more=["new", 1])) == decode_task(TASK)
    assert decode_result(rewritten(RESULT, more=["new", 1])) == decode_result(RESULT)


@given(data=st.binary() | st.builds(lambda cut: TASK[:cut], st.integers(0, len(TASK) - 1)))
@example(b"")
@example(msgspec.msgpack.encode([0]))
@example(msgspec.msgpack.encode([VERSION]))
@example(msgspec.msgpack.encode({"version": VERSION}))
@example(b"\x91" * 100_000)
@example(b"\x92\x01" + b"\x91" * 100_000)
def test_garbage_is_reported_as_damaged(data: bytes) -> None:
    for decode in (decode_task, decode_result):
        with contextlib.suppress(EnvelopeDamaged, EnvelopeTooNew):
            decode(data)


def test_the_error_for_a_damaged_envelope_shows_no_content() -> None:
    items = msgspec.msgpack.decode(TASK)
    items[1] = ""  # no task type
    items[2] = "secret"
    with pytest.raises(EnvelopeDamaged) as caught:
        decode_task(msgspec.msgpack.encode(items))
    assert "secret" not in str(caught.value)
