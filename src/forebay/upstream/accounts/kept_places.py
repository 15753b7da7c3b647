"""The places that calls keep while they wait outside of the queue to be retried."""

from __future__ import annotations

from typing import Final

from forebay.quota import HeldCharge
from forebay.upstream.call_request import CallRequest

_MAX_PLACES: Final = 64  # that are kept, so that a decision looks at few
_LATE: Final = 1.0  # seconds after which a call that has not come back loses its place


class KeptPlaces:
    """The calls that failed or were throttled, and come back after a backoff. Pure: the caller passes the time.

    Such a call has waited for its quotas once. What it needs of them is held against calls that were never sent, so
    that it does not wait for another window because these took what was left of the present one meanwhile.

    Attributes:
        kept: what the calls need, by call.
    """

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: dict[CallRequest, HeldCharge] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def __contains__(self, request: CallRequest) -> bool:
        return request in self.kept

    def keep(self, now: float, request: CallRequest, back_at: float) -> None:
        """Keep the place of a call that comes back at `back_at`, unless too many are kept already."""
        if len(self.kept) >= _MAX_PLACES and request not in self.kept:
            self._drop_late(now)
            if len(self.kept) >= _MAX_PLACES:
                return
        self.kept[request] = HeldCharge(request.charge, back_at)

    def drop(self, request: CallRequest) -> None:
        """Free the place of a call: it is back, or does not come back."""
        self.kept.pop(request, None)

    def held_from(self, now: float, request: CallRequest) -> list[HeldCharge]:
        """Return what `request` has to leave: the needs of calls of its priority or a better one.

        A call that comes back itself leaves nothing: it goes to the head of the queue.
        """
        if request.retries:
            return []
        self._drop_late(now)
        return [held for other, held in self.kept.items() if other.priority <= request.priority]

    def next_end(self) -> float | None:
        """Return when the next place is lost, if its call does not come back; None if no place is kept."""
        return min(held.back_at for held in self.kept.values()) + _LATE if self.kept else None

    def _drop_late(self, now: float) -> None:
        for request in [request for request, held in self.kept.items() if held.back_at + _LATE <= now]:
            del self.kept[request]
