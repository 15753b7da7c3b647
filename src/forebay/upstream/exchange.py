"""One HTTP request on its way through an upstream: what it asks, and what its answers come to. Nothing here waits.

It knows no HTTP library: whoever sends it says what came, and adds the answer that its caller gets to what comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.task import Priority
from forebay.typing import Charge, Notice, Outcome
from forebay.upstream.ask import Ended, Permit
from forebay.upstream.attempt import Tried
from forebay.upstream.readdress import Readdressed, may_leave, readdress
from forebay.upstream.reader import Reader
from forebay.upstream.rules import (
    Meaning,
    Meter,
    Plain,
    Route,
    Usage,
    UsageFilter,
    meaning_of,
    notices,
    read_whole,
    retry_after,
    wants_retry,
)

if TYPE_CHECKING:
    from forebay.upstream.stops import Stop
    from forebay.upstream.upstream import Upstream

ERRORS: Final = 400
REDIRECTS: Final = 300
_NOT_NOW: Final = frozenset(
    {Meaning.RATE, Meaning.CONCURRENCY, Meaning.ACCELERATION, Meaning.OVERLOADED, Meaning.SPEND_CAP}
)
_COUNTED: Final = Charge()
_STOP: Final = 60.0  # seconds that an account rests when its provider says that its money is spent
_LONGEST_STOP: Final = 3_600.0  # ... however long it says that this lasts: money may be paid in at any time


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """On whose behalf a request is sent, where it does not come from a task that runs here.

    Attributes:
        priority: its rung.
        deadline: the time of `forebay.clock.now` when its answer becomes worthless.
        tenant: who pays for it.
        run: the id of the run that it belongs to, or None.
        key: the API key whose account it is of; None where that is to be read from the request.
    """

    priority: Priority = Priority.NORMAL
    deadline: float = float("inf")
    tenant: str = "default"
    run: str | None = None
    key: str | None = None


class Exchange:
    """One request, from the account that it belongs to up to the answer that its caller gets.

    Args:
        upstream: through which it goes.
        method: such as ``"POST"``.
        path: of its URL, with the query.
        headers: of the request.
        body: as it is sent; None for one that is read as it is sent, so it cannot be sent again.
        sender: on whose behalf; None for the task that runs here, if one does.

    Attributes:
        upstream: through which it goes.
        key: the API key whose account it is of, as its header has it.
        read: what is asked for.
        desk: of the account that it belongs to.
        ask: what it asks of that account.
        changed: the body to send in place of its own, or None.
        meaning: what its latest answer meant.
    """

    __slots__ = (
        "_after", "_content", "_path", "_status", "ask", "changed", "desk", "key", "meaning", "read", "upstream",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913 - the parts of a request
        self,
        upstream: Upstream,
        *,
        method: str,
        path: str,
        headers: Plain,
        body: bytes | None,
        sender: Sender | None = None,
    ) -> None:
        rules = upstream.rules
        self.upstream = upstream
        self._path = path
        self._content = body
        body = body or b""
        self.read = rules.read(method, path, headers, body)
        model = self.read.model or ""
        self.key = _key(headers) if sender is None or sender.key is None else sender.key
        self.desk = upstream.books.desk(model, self.key)
        if self.read.websocket:
            upstream.warn_unmetered()
        known = self.desk.experience
        charge = rules.reserve(self.read, output_tokens=known.output_tokens, input_ratio=known.ratio.value)
        free = self.read.free
        if sender is None:
            self.ask = upstream.ask(model, charge, free=free)
        else:
            self.ask = upstream.ask_for(sender, model, charge, free=free)
        self.changed = rules.add_usage(self.read, body)
        self.meaning = Meaning.SUCCESS
        self._after: float | None = None
        self._status: int | None = None

    def finish(self) -> None:
        """The last answer goes to the caller; if it is *not now*, the run that is under way hears of it."""
        if self.meaning is Meaning.SUCCESS:
            return
        refusal = self.turned_away()
        if refusal is not None and (running := context.drawing()) is not None:
            running.refused(self.desk, refusal)

    # --- where else it may go ---

    def may_leave(self, stop: Stop) -> bool:
        """Whether another account could serve it, as far as that is cheap to tell."""
        return self._content is not None and may_leave(stop, self.read, self.ask.model)

    def readdressed(self, stop: Stop) -> Readdressed | None:
        """The request as it is sent there; None if it cannot be answered there."""
        assert self._content is not None  # noqa: S101 - else it may not leave
        return readdress(stop, self._path, self.read, self._content, self.key)

    def turned_away(self) -> Overloaded | None:
        """What its provider's latest answer comes to, if that was *not now*."""
        if self.meaning not in _NOT_NOW:
            return None
        return Overloaded(self.words(), binding=self.desk.name, retry_after=self._after)

    def words(self) -> str:
        """What its latest attempt came to, for a person."""
        if self._status is None:
            return f"{self.upstream.name}: its provider could not be reached"
        return f"{self.upstream.name}: its provider answered {self._status} ({self.meaning.value})"

    # --- an answer that is still coming ---

    def is_open(self, status: int, kind: str) -> bool:
        """Whether the answer is passed on while it comes: events, or what nothing is known of.

        Args:
            status: of the answer.
            kind: its Content-Type.
        """
        return status < REDIRECTS and (self.read.route is Route.OTHER or _is_events(kind))

    def reader(self, permit: Permit, headers: Plain) -> Reader:
        """What meters an open answer, and closes its permit."""
        self.desk.began(permit, self._notices(headers))
        meter = None
        made = not self.read.free  # else it is fetched, and was metered when it was made
        if made and _is_events(headers.get("content-type", "")):
            meter = Meter(stream=True, input_tokens=self.ask.charge.input_tokens)
        keep = None if self.changed is None else UsageFilter()
        return Reader(self, permit, meter, keep, judged=self.read.makes_tokens)

    def open(self) -> Tried:
        """The answer has begun; whoever reads it closes the permit."""
        self.meaning = Meaning.SUCCESS
        return Tried(ended=Ended(outcome=Outcome.SUCCESS), open=True)

    # --- what an attempt comes to ---

    def whole(self, permit: Permit, status: int, headers: Plain, body: bytes) -> Tried:
        """The answer is all there; its body without the Content-Encoding."""
        heard = self._notices(headers, always=status >= ERRORS)
        self.meaning = Meaning.SUCCESS
        self._status = status
        if status >= ERRORS:
            meaning = self.meaning = meaning_of(status, headers, body)
            self._after = retry_after(headers, body, wall=clock.wall_time())
            if meaning in _NOT_NOW:
                return self._not_now(headers, heard)
            seconds = clock.now() - permit.at
            ended = Ended(outcome=meaning.outcome, used=_COUNTED, usd=0.0, seconds=seconds, notices=heard)
            return self._tried(headers, ended)
        if status >= REDIRECTS:
            return Tried(ended=Ended(outcome=Outcome.IGNORED, used=_COUNTED, usd=0.0, notices=heard))
        read = read_whole(body)
        outcome = Outcome.SUCCESS if read.error is None else read.error.outcome
        return Tried(ended=self.ended(permit, outcome, read.usage, heard))

    def _notices(self, headers: Plain, *, always: bool = False) -> tuple[Notice, ...]:
        """What the headers of an answer say of the quotas, if that may matter, as it `always` does for a refusal."""
        return notices(headers, wall=clock.wall_time()) if always or self.desk.listens() else ()

    def _not_now(self, headers: Plain, heard: tuple[Notice, ...]) -> Tried:
        """It was refused at the provider's door: nothing was used."""
        meaning, after = self.meaning, self._after
        if meaning is Meaning.SPEND_CAP:
            self.desk.stop(_STOP if after is None else min(after, _LONGEST_STOP))
        rate = meaning is Meaning.RATE
        ended = Ended(outcome=meaning.outcome, released=not rate, rate=rate, retry_after=after, notices=heard, usd=0.0)
        return self._tried(headers, ended)

    def _tried(self, headers: Plain, ended: Ended) -> Tried:
        """An attempt that did not succeed; whether there may be another, the provider may say itself."""
        meaning = self.meaning
        told = None if meaning is Meaning.SPEND_CAP else wants_retry(headers)
        again = self._content is not None and (meaning.retried if told is None else told)
        elsewhere = meaning in _NOT_NOW or meaning is Meaning.FAULT
        return Tried(
            ended=ended, again=again, counts=meaning.uses_attempt, retry_after=self._after, elsewhere=elsewhere
        )

    def broke(self, permit: Permit, error: Exception, *, sent: bool = True, ours: bool = False) -> Tried:
        """The connection failed, before the answer or within it.

        Args:
            permit: of the attempt.
            error: what its caller gets, if it is the last.
            sent: whether a byte may have left.
            ours: the provider had no part in it, and another attempt would not help.
        """
        self.meaning = Meaning.FAULT
        self._status = None
        outcome = Outcome.IGNORED if ours else Outcome.FAULT
        if sent and not ours:
            ended = Ended(outcome=outcome, seconds=clock.now() - permit.at)
        else:
            ended = Ended(outcome=outcome, released=True, usd=0.0)
        return Tried(error=error, ended=ended, again=self._content is not None and not ours, elsewhere=not ours)

    # --- what the account hears ---

    def ended(self, permit: Permit, outcome: Outcome, usage: Usage | None, heard: tuple[Notice, ...] = ()) -> Ended:
        """How a call ended that was answered, with what it used."""
        seconds = clock.now() - permit.at
        if usage is None:
            return Ended(outcome=outcome, seconds=seconds, notices=heard)
        used = self.upstream.rules.settle(self.ask.charge, usage)
        usd = 0.0
        if self.upstream.counts_money:
            made = Charge(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
            usd = self.upstream.dollars(self.ask.model, made, cached_tokens=usage.cache_read_tokens)
        told = outcome is Outcome.SUCCESS and not usage.estimated
        return Ended(
            outcome=outcome,
            used=used,
            usd=usd,
            seconds=seconds,
            made=usage.output_tokens,
            foreseen=self.read.input_tokens if told else None,
            notices=heard,
        )


def _key(headers: Plain) -> str:
    """The API key of a request, or nothing."""
    for name in ("authorization", "x-api-key", "api-key"):
        if key := headers.get(name):
            return key
    return ""


def _is_events(kind: str) -> bool:
    return kind.lower().startswith("text/event-stream")
