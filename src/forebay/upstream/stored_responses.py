"""Responses that a provider stores, by id: what later calls that fetch or continue them need to know."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, Generic, NamedTuple, TypeVar

from forebay.upstream.call_request import Permit

ValueT = TypeVar("ValueT")

_MAX_RESPONSES: Final = 10_000  # the oldest are forgotten


class BackgroundResponse(NamedTuple):
    """A response made in the background, whose usage is not known yet.

    Attributes:
        model: that it was requested from.
        tier: that it was requested with.
        permit: of the call that made it, with the dollars that were counted for it.
    """

    model: str
    tier: str
    permit: Permit


class StoredResponses(Generic[ValueT]):
    """A value for each of the latest stored responses of an upstream, by id. Safe to use from any thread."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, ValueT] = OrderedDict()
        self._lock = threading.Lock()

    def reset_after_fork(self) -> None:
        """See `ForkAware`. What the provider stores is there for the child too."""
        self._lock = threading.Lock()

    def add(self, response_id: str, value: ValueT) -> None:
        """Remember the value of a response, and forget the oldest one if there are too many."""
        with self._lock:
            self._values[response_id] = value
            if len(self._values) > _MAX_RESPONSES:
                self._values.popitem(last=False)

    def get(self, response_id: str | None) -> ValueT | None:
        """Return the value of a response; None if it is not known."""
        return None if response_id is None else self._values.get(response_id)

    def pop(self, response_id: str) -> ValueT | None:
        """Return the value of a response, and forget it; None if it is not known."""
        with self._lock:
            return self._values.pop(response_id, None)
