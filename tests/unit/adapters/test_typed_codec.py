"""Declared types: a value is loaded as it was, or it is rejected at submit."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import math
import subprocess
import sys
import uuid
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.adapters import codec_for
from forebay.errors import InvalidSetting
from forebay.interfaces import Codec, TypeMismatch
from forebay.overflow import decode_task, encode_task
from forebay.task import Task

BOUND = 1 << 20
T = TypeVar("T")
Metres = NewType("Metres", int)


def codec(declared: Any) -> Codec:
    return codec_for(declared, owner="worker 'w'", name="payload")


def round_trip(declared: Any, value: Any) -> tuple[Any, Any]:
    """Return the value as a handler gets it: directly, and from the overflow, through bytes and a codec of its own."""
    here, there = codec(declared), codec(declared)
    coerced = here.coerce(value)
    envelope = encode_task(Task("work"), here.dump(coerced), bound=BOUND)
    return coerced, there.load(decode_task(envelope).payload)


def mismatch(declared: Any, value: Any) -> tuple[str, str]:
    with pytest.raises(TypeMismatch) as caught:
        codec(declared).coerce(value)
    return caught.value.path, caught.value.reason


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    SMALL = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    pairs: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass
class Everything:
    when: dt.datetime
    day: dt.date
    took: dt.timedelta
    at: dt.time
    id: uuid.UUID
    price: decimal.Decimal
    colour: Colour
    size: Size
    numbers: set[int]
    names: frozenset[str]
    raw: bytes
    inner: Inner
    inners: list[Inner]
    by_number: dict[int, Inner]
    by_day: dict[dt.date, str]
    ratio: float
    pair: tuple[int, str]
    maybe: Inner | None
    anything: Any


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WHOLE = st.integers(-(2**63), 2**63 - 1)
INNER = st.builds(Inner, TEXT, st.lists(st.tuples(WHOLE, TEXT), max_size=3).map(tuple))
OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))
PLAIN = st.recursive(
    st.none() | st.booleans() | WHOLE | TEXT | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(TEXT, inner),
    max_leaves=5,
)
EVERYTHING = st.builds(
    Everything,
    when=st.datetimes(timezones=st.none() | OFFSETS),
    day=st.dates(),
    took=st.timedeltas(),
    at=st.times(),
    id=st.uuids(),
    price=st.decimals(allow_nan=False),
    colour=st.sampled_from(Colour),
    size=st.sampled_from(Size),
    numbers=st.sets(WHOLE),
    names=st.frozensets(TEXT),
    raw=st.binary(),
    inner=INNER,
    inners=st.lists(INNER, max_size=3),
    by_number=st.dictionaries(WHOLE, INNER, max_size=3),
    by_day=st.dictionaries(st.dates(), TEXT, max_size=3),
    ratio=st.floats(allow_nan=False),
    pair=st.tuples(WHOLE, TEXT),
    maybe=st.none() | INNER,
    anything=PLAIN,
)


def kinds(value: Any) -> Any:
    """Return the types of a value and of all its parts."""
    if dataclasses.is_dataclass(value):
        return type(value), [kinds(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return dict, [(kinds(name), kinds(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [kinds(item) for item in value]
    return type(value)


# --- round trips ------------------------------------------------------------------------------------------------------


@given(value=EVERYTHING)
def test_a_value_is_loaded_equal_and_of_the_same_types(value: Everything) -> None:
    coerced, loaded = round_trip(Everything, value)
    assert coerced == loaded == value
    assert kinds(coerced) == kinds(loaded) == kinds(value)
    assert loaded.when.utcoffset() == value.when.utcoffset()


class Struct(msgspec.Struct):
    x: int
    inner: Inner | None = None


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    name: str


class Box(msgspec.Struct, Generic[T]):
    content: T


class Node(msgspec.Struct):
    below: list[Node] = []


@attrs.define
class Attrs:
    day: dt.date


class Dictionary(TypedDict, total=False):
    day: dt.date


class Named(NamedTuple):
    x: int
    day: dt.date = dt.date(2025, 1, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slotted:
    x: int
    doubled: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(eq=False)
class Unequal:
    x: int


class Model(pydantic.BaseModel):
    x: int = 0
    when: dt.datetime | None = None
    numbers: set[int] = set()
    pair: tuple[int, str] = (1, "a")
    price: decimal.Decimal = decimal.Decimal("1.10")
    ratio: float = 0.5
    inner: Inner | None = None


class Aliased(pydantic.BaseModel):
    topic: str = pydantic.Field(alias="theTopic")
    kind: str = pydantic.Field(default="", validation_alias="in", serialization_alias="out")


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    when: dt.datetime
    pair: tuple[int, ...]


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")


class Raw(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    raw: bytes


@dataclasses.dataclass
class HoldsModel:
    models: list[Model]


@pydantic.dataclasses.dataclass
class OfPydantic:
    x: int


BERLIN = dt.datetime(2025, 7, 1, 9, tzinfo=dt.timezone(dt.timedelta(hours=2)))


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (Struct, Struct(1, Inner("a"))),
        (Struct | None, None),
        (Cat | Dog, Dog("rex")),
        (Box[int], Box(1)),
        (Box[list[Cat | Dog]], Box([Cat(9), Dog("rex")])),
        (Node, Node([Node(), Node([Node()])])),
        (Attrs, Attrs(dt.date(2025, 1, 1))),
        (Dictionary, {"day": dt.date(2025, 1, 1)}),
        (Named, Named(1)),
        (Slotted, Slotted(x=1)),
        (list[Struct], [Struct(1)]),
        (dict[uuid.UUID, set[dt.date]], {uuid.UUID(int=1): {dt.date(2025, 1, 1)}}),
        (tuple[int, ...], (1, 2)),
        (dt.datetime, BERLIN),
        (Colour, Colour.RED),
        (Literal["a", 1], 1),
        (Metres, 5),
        (Annotated[int, msgspec.Meta(gt=1)], 5),
        (float, math.inf),
        (Model, Model(x=5, when=BERLIN, numbers={1}, pair=(2, "b"), inner=Inner("a", ((1, "b"),)))),
        (Model, Model(ratio=-math.inf)),
        (list[Model], [Model(x=1)]),
        (Model | None, None),
        (Model | Strict, Strict(when=BERLIN, pair=(1, 2))),
        (Annotated[Model, "of mine"], Model(x=1)),
        (Aliased, Aliased(theTopic="rivers", **{"in": "b"})),
        (Open, Open.model_validate({"more": [1, "a"]})),
        (Raw, Raw(raw=b"\xff\x00")),
        (HoldsModel, HoldsModel([Model(x=1)])),
        (OfPydantic, OfPydantic(1)),
    ],
    ids=str,
)
def test_a_value_of_every_kind_of_type_is_loaded_as_it_was(declared: Any, value: Any) -> None:
    coerced, loaded = round_trip(declared, value)
    assert coerced == loaded == value
    assert type(coerced) is type(loaded) is type(value)


def test_a_value_that_does_not_equal_itself_is_loaded_too() -> None:
    for declared, value in (
        (Box[float], Box(math.nan)),
        (decimal.Decimal, decimal.Decimal("NaN")),
        (Model, Model(ratio=math.nan)),
        (Unequal, Unequal(1)),
    ):
        coerced, loaded = round_trip(declared, value)
        assert repr(coerced) == repr(loaded) != ""


def test_a_coerced_value_is_a_copy() -> None:
    value = Struct(1, Inner("a"))
    coerced = codec(Struct).coerce(value)
    value.x = 2
    assert coerced == Struct(1, Inner("a"))


@pytest.mark.parametrize(
    ("declared", "plain", "value"),
    [
        (Struct, {"x": 1, "inner": {"name": "a", "pairs": [[1, "b"]]}}, Struct(1, Inner("a", ((1, "b"),)))),
        (list[Struct], [{"x": 1}, Struct(2)], [Struct(1), Struct(2)]),
        (set[dt.date], ["2025-01-01"], {dt.date(2025, 1, 1)}),
        (dict[int, str], {"1": "a"}, {1: "a"}),
        (Cat | Dog, {"type": "Dog", "name": "rex"}, Dog("rex")),
        (Model, {"x": "5", "pair": [1, "a"]}, Model(x=5)),
        (Aliased, {"theTopic": "rivers"}, Aliased(theTopic="rivers")),
    ],
)
def test_plain_data_are_coerced_to_the_type(declared: Any, plain: Any, value: Any) -> None:
    assert round_trip(declared, plain) == (value, value)


# --- mismatches ------------------------------------------------------------------------------------------------------


class Derived(Struct):
    more: int = 1


class DerivedModel(Model):
    more: int = 1


class Excluding(pydantic.BaseModel):
    x: int = pydantic.Field(default=1, exclude=True)


class Unstable(pydantic.BaseModel):
    """A model whose validator changes the value each time."""

    text: str

    @pydantic.field_validator("text")
    @classmethod
    def shout(cls, text: str) -> str:
        return text + "!"


@dataclasses.dataclass
class Growing:
    x: int

    def __post_init__(self) -> None:
        self.x += 1


@dataclasses.dataclass
class Choosy:
    x: Any

    def __post_init__(self) -> None:
        if isinstance(self.x, str):
            raise KeyError(self.x) if self.x.startswith("k") else ValueError(self.x)


class Secret(pydantic.BaseModel):
    key: pydantic.SecretStr


@pytest.mark.parametrize(
    ("declared", "value", "path", "why"),
    [
        (Struct, {"x": "sk-secret"}, ".x", "Expected `int`, got `str`"),
        (Struct, Struct("sk-secret"), ".x", "Expected `int`, got `str`"),  # type: ignore[arg-type]
        (Struct, {"inner": None}, "", "Object missing required field `x`"),
        (list[Struct], [{"x": 1}, {"x": 1.5}], "[1].x", "Expected `int`, got `float`"),
        (dict[str, int], {"sk-secret": "sk-secret"}, "[...]", "Expected `int`, got `str`"),
        (Colour, "sk-secret", "", "it is not valid"),
        (Cat | Dog, {"type": "sk-secret"}, ".type", "it is not valid"),
        (Literal["a"], "sk-secret", "", "it is not valid"),
        (Choosy, {"x": "sk-secret"}, "", "it is not valid"),
        (Choosy, {"x": "k-sk-secret"}, "", "its type raised KeyError"),
        (Box[Any], Box([1, object()]), ".content[1]", "a object has no plain form"),
        (Box[Any], Box({(1, 2): 3}), ".content", "a dict has no plain form"),
        (Model, {"x": "sk-secret"}, ".x", "pydantic finds int parsing"),
        (Model, {"pair": [1, ["sk-secret"]]}, ".pair[1]", "pydantic finds string type"),
        (dict[str, Model], {"sk secret": {"x": "sk-secret"}}, "[...].x", "pydantic finds int parsing"),
        (Model, Model.model_construct(x="sk-secret"), ".x", "pydantic finds int parsing"),
        (Aliased, {}, ".theTopic", "pydantic finds missing"),
    ],
)
def test_a_mismatch_names_the_path_and_never_the_value(declared: Any, value: Any, path: str, why: str) -> None:
    assert mismatch(declared, value) == (path, why)


@pytest.mark.parametrize(
    ("declared", "value", "path"),
    [
        (Struct, Derived(1), ""),
        (list[Struct], [Derived(1)], "[0]"),
        (Model, DerivedModel(), ""),
        (list[Model], [DerivedModel()], "[0]"),
        (Box[Any], Box(Struct(1)), ".content"),
        (Box[Any], Box([{1}]), ".content[0]"),
        (Box[Any], Box({1: 2}), ".content"),
        (Box[Any], Box(bytearray(b"x")), ".content"),
        (Box[Any], Box(BERLIN), ".content"),
        (list[Any], [{1: 2}], "[0]"),
        (Box[Struct], {"content": Derived(1)}, ".content"),
        (str, Colour.RED, ""),
        (Excluding, Excluding(x=2), ".x"),
        (Secret, Secret(key=pydantic.SecretStr("sk-secret")), ".key"),
        (Unstable, Unstable(text="a"), ".text"),
        (Unstable, {"text": "a"}, ".text"),
        (Growing, {"x": 1}, ".x"),
    ],
)
def test_a_value_that_would_be_loaded_as_something_else_is_rejected(declared: Any, value: Any, path: str) -> None:
    where, why = mismatch(declared, value)
    assert where == path
    assert "would come back as" in why
    assert "secret" not in why


def test_a_value_that_contains_itself_is_rejected() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    assert mismatch(list[Any], cycle)[1] == "it is nested too deeply, or contains itself"


CODECS = [codec(declared) for declared in (Everything, Cat | Dog, Model, list[Strict], Box[int], Named)]


@given(data=PLAIN | st.fixed_dictionaries({"x": PLAIN, "type": PLAIN, "pair": PLAIN, "inner": PLAIN}))
def test_any_stored_data_are_loaded_or_rejected_as_a_mismatch(data: Any) -> None:
    for each in CODECS:
        with contextlib.suppress(TypeMismatch):
            assert each.coerce(each.load(data)) is not None


# --- declaring a type ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class HoldsComplex:
    z: list[complex]


class Forward(msgspec.Struct):
    later: NotThere  # type: ignore[name-defined] # noqa: F821 - missing on purpose


class MixesThem(msgspec.Struct):
    model: Model


def in_a_function() -> Any:
    class Hidden(msgspec.Struct):
        x: int

    class Outer(msgspec.Struct):
        hidden: Hidden

    return Outer


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        (complex, "complex"),
        (HoldsComplex, "complex"),
        (Forward, "NotThere"),
        (in_a_function(), "Hidden"),
        (list["Struct"], "not supported"),
        ("Struct", "not supported"),
        (5, "not supported"),
        (dt.datetime | str, "more than one str-like"),
        (Struct | Inner, "more than one dict-like"),
        (MixesThem, "Model"),
        (Model | Struct, "Struct"),
    ],
    ids=str,
)
def test_a_type_that_cannot_be_declared_is_rejected_at_once(declared: Any, why: str) -> None:
    with pytest.raises(InvalidSetting, match=r"worker 'w' was given payload=.*must be a type") as caught:
        codec(declared)
    assert why in str(caught.value)


def test_a_class_defined_in_a_function_may_be_declared_if_it_needs_no_other() -> None:
    class Private(msgspec.Struct):
        x: int

    assert round_trip(Private, {"x": 1}) == (Private(1), Private(1))


def test_pydantic_is_imported_only_when_one_of_its_types_is_declared() -> None:
    program = """
import sys, dataclasses
import forebay
@dataclasses.dataclass
class Plain:
    x: int
supervisor = forebay.BackpressureSupervisor()
supervisor.register_worker("w", handler=print, task_types=["t"], payload=Plain, result=list[Plain])
assert "pydantic" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- two releases of a type ------------------------------------------------------------------------------------------


def release(base: type, **fields: Any) -> Any:
    """Return one release of a type, of the kind of `base`."""
    hints = {name: hint for name, (hint, *_) in fields.items()}
    defaults = {name: default for name, (_, *default) in fields.items() if default}
    if base is pydantic.BaseModel:
        given = {name: (hint, *defaults.get(name, (...,))) for name, hint in hints.items()}
        return pydantic.create_model("Released", **given)  # type: ignore[call-overload]
    spread = [(name, hint, *defaults.get(name, ())) for name, hint in hints.items()]
    if base is msgspec.Struct:
        return msgspec.defstruct("Released", spread)
    return dataclasses.make_dataclass("Released", spread)


@pytest.mark.parametrize("base", [msgspec.Struct, object, pydantic.BaseModel])
def test_a_field_may_be_added_with_a_default_and_be_removed(base: type) -> None:
    old, new = release(base, x=(int,)), release(base, x=(int,), y=(str, "new"))
    stored = codec(old).dump(codec(old).coerce(old(x=1)))
    assert codec(new).load(stored).y == "new"
    stored = codec(new).dump(codec(new).coerce(new(x=1, y="b")))
    assert codec(old).load(stored).x == 1


@pytest.mark.parametrize("base", [msgspec.Struct, object, pydantic.BaseModel])
def test_a_field_that_was_added_without_a_default_is_named(base: type) -> None:
    old, new = release(base, x=(int,)), release(base, x=(int,), added=(str,))
    stored = codec(old).dump(codec(old).coerce(old(x=1)))
    with pytest.raises(TypeMismatch) as caught:
        codec(new).load(stored)
    assert "added" in caught.value.path + caught.value.reason
