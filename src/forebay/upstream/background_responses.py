"""Responses that a provider stores: those made in the background, whose usage comes later, and how long all are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay.upstream.call_request import SpendReservation

_MAX_RESPONSES: Final = 10_000  # the oldest stay paid as they were reserved


class BackgroundResponse(NamedTuple):
    """One response whose usage is not known yet.

    Attributes:
        model: that it was requested from.
        tier: that it was requested with.
        spend: the dollars that were counted for it, of each budget.
    """

    model: str
    tier: str
    spend: Sequence[SpendReservation]


class BackgroundResponses:
    """The responses of an upstream whose usage is not known yet, by id. Bounded, and safe to use from any thread."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, BackgroundResponse] = OrderedDict()
        self._lock = threading.Lock()

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The parent gets the usage of its responses."""
        self._lock = threading.Lock()
        self._responses.clear()

    def add(self, response_id: str, response: BackgroundResponse) -> None:
        """Remember a response that was created."""
        with self._lock:
            self._responses[response_id] = response
            if len(self._responses) > _MAX_RESPONSES:
                self._responses.popitem(last=False)

    def pop(self, response_id: str) -> BackgroundResponse | None:
        """Return a response whose usage has arrived, and forget it; None if it is unknown."""
        with self._lock:
            return self._responses.pop(response_id, None)


class StoredTokens:
    """The tokens of stored responses, by id: a call that continues one sends as many unseen. Safe from any thread."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def reset_after_fork(self) -> None:
        """See `ForkAware`. What the provider stores is there for the child too."""
        self._lock = threading.Lock()

    def add(self, response_id: str, tokens: int) -> None:
        """Remember the input and output of a response."""
        with self._lock:
            self._tokens[response_id] = tokens
            if len(self._tokens) > _MAX_RESPONSES:
                self._tokens.popitem(last=False)

    def get(self, response_id: str | None) -> int | None:
        """Return the tokens of a response; None if they are not known."""
        return None if response_id is None else self._tokens.get(response_id)
