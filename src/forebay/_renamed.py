"""Public names that have changed: passing an old one raises an error that gives the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def renamed(owner: str, old: str, new: str) -> str:
    """Return the message for an argument or attribute with a new name; `new` may also be a sentence of advice."""
    return f"{owner}: {old} is now {new}" if new.isidentifier() else f"{owner} has no {old}: {new}"


def renamed_arguments(**renames: str) -> Callable[[_F], _F]:
    """Make a function or class reject the old names of its arguments with an error that gives the new ones.

    Args:
        **renames: the new name of an argument by its old name, or advice if that is more than one word.

    Returns:
        A decorator. The decorated function or class raises a TypeError if it is called with an old name.
    """

    def decorate(target: _F) -> _F:
        if isinstance(target, type):
            target.__init__ = _rejecting(target.__init__, renames)  # type: ignore[misc]
            return target
        wrapped: Any = _rejecting(target, renames)
        return wrapped  # type: ignore[no-any-return]

    return decorate


def _rejecting(function: Callable[..., Any], renames: Mapping[str, str]) -> Callable[..., Any]:
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in renames:
                raise TypeError(renamed(owner, name, renames[name]))
        return function(*args, **kwargs)

    return wrapper
