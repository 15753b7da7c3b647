"""What a saga finds out about the functions of its steps, and remembers."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from forebay.saga import step as steps
from forebay.saga.step import Step, step_of


@dataclass
class Notes:
    text: str


def plain(value: Any) -> Any:
    return value


def typed(value: str) -> Notes:
    return Notes(value)


def with_key(value: Any, *, key: str) -> str:
    return f"{value} {key}"


def with_default(value: Any, key: str = "") -> str:
    return f"{value} {key}"


def asked(function: Callable[..., Any]) -> Step:
    return step_of("step", function, (), compensate=None, pivot=False, retry=None, check=None, idempotent=False)


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_function_is_called_as_it_declares_each_time(time: str) -> None:  # noqa: ARG001 - the second time it is known
    assert [steps._place_of_key(each) for each in (plain, typed, with_key, with_default, partial(with_key, 1))] == [
        -1,
        -1,
        sys.maxsize,
        1,
        sys.maxsize,
    ]
    assert asked(plain).codec is None
    codec = asked(typed).codec
    assert codec is not None
    assert codec.load(codec.dump(Notes("a"))) == Notes("a")


def in_a_closure(held: Notes) -> Callable[[], Notes]:
    return lambda: held


def as_a_default(held: Notes) -> Callable[[], Notes]:
    def answer(value: Notes = held) -> Notes:
        return value

    return answer


@pytest.mark.parametrize("hold", [in_a_closure, as_a_default])
def test_what_a_function_holds_is_not_kept_alive(hold: Callable[[Notes], Callable[[], Notes]]) -> None:
    held = Notes("large")
    kept = weakref.ref(held)
    function = hold(held)
    asked(function)
    assert steps._place_of_key(function) == -1
    del held, function
    gc.collect()
    assert kept() is None
