"""One HTTP request on its way through an upstream: what it asks, and what its answers come to. Nothing here waits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.typing import Charge, Notice, Outcome
from forebay.upstream.ask import Ended, Permit
from forebay.upstream.attempt import Tried
from forebay.upstream.rules import (
    Meaning,
    Meter,
    Plain,
    Route,
    Usage,
    UsageFilter,
    meaning_of,
    notices,
    retry_after,
    wants_retry,
)
from forebay.upstream.transport.dress import Dress, find_dress
from forebay.upstream.transport.reader import Reader

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream

_ERRORS: Final = 400
_REDIRECTS: Final = 300
_NOT_NOW: Final = frozenset(
    {Meaning.RATE, Meaning.CONCURRENCY, Meaning.ACCELERATION, Meaning.OVERLOADED, Meaning.SPEND_CAP}
)
_COUNTED: Final = Charge()
_STOP: Final = 60.0  # seconds that an account rests when its provider says that its money is spent
_gave_up: ContextVar[tuple[type[Exception], str] | None] = ContextVar("forebay_gave_up", default=None)


@dataclass(frozen=True, slots=True)
class Binding:
    """What the calls of one bound client have in common.

    Attributes:
        upstream: through which they go.
        http: the HTTP library of the client.
        dress: of the SDK that makes them; None where that is seen from each request.
    """

    upstream: Upstream
    http: ModuleType
    dress: Dress | None


class Exchange:
    """One request, from the account that it belongs to up to the answer that its caller gets."""

    __slots__ = (
        "_after",
        "_binding",
        "_dress",
        "_meaning",
        "_original",
        "_replayable",
        "ask",
        "desk",
        "filtered",
        "read",
        "request",
    )

    def __init__(self, binding: Binding, request: Any) -> None:
        self._binding = binding
        self._original = request
        upstream = binding.upstream
        rules = upstream.rules
        try:
            body, self._replayable = request.content, True
        except binding.http.RequestNotRead:  # a file, say: it is read as it is sent, and cannot be sent again
            body, self._replayable = b"", False
        headers = Plain.of_wire(request.headers.raw)
        self._dress = binding.dress or find_dress(binding.http, headers, upstream.provider)
        self.read = rules.read(request.method, request.url.raw_path.decode("ascii"), headers, body)
        self.desk = upstream.books.desk(self.read.model or "", _key(headers))
        if self.read.websocket:
            upstream.warn_unmetered()
        known = self.desk.experience
        charge = rules.reserve(self.read, output_tokens=known.output_tokens, input_ratio=known.ratio.value)
        self.ask = upstream.ask(self.read.model or "", charge)
        self.request = request
        changed = rules.add_usage(self.read, body)
        self.filtered = changed is not None
        if changed is not None:
            sent = request.headers.copy()
            sent["content-length"] = str(len(changed))
            self.request = binding.http.Request(
                request.method, request.url, headers=sent, content=changed, extensions=request.extensions
            )
        self._meaning = Meaning.SUCCESS
        self._after: float | None = None

    # --- what is told to the caller ---

    def check_repeated(self) -> None:
        """An SDK that calls again what was given up here is told the same at once: retries are made in one place."""
        gave_up = _gave_up.get()
        if gave_up is None:
            return
        _gave_up.set(None)
        if self._original.headers.get("x-stainless-retry-count", "0") != "0":
            _gave_up.set(gave_up)
            raise self._failure(gave_up[0](gave_up[1]))

    def refusal(self, error: Overloaded) -> Overloaded:
        """A refusal of ours, as the caller's SDK lets it through."""
        return self._dress.refusal(error, self._original)

    def finish(self, response: Any) -> Any:
        """The last answer goes to the caller; if it is *not now*, the run that is under way hears of it."""
        running = context.drawing()
        if self._meaning in _NOT_NOW and running is not None:
            name = self._binding.upstream.name
            reason = f"{name}: its provider answered {response.status_code} ({self._meaning.value})"
            running.refused(self.desk, Overloaded(reason, binding=self.desk.name, retry_after=self._after))
        return response

    # --- what an attempt comes to ---

    def is_open(self, response: Any) -> bool:
        """Whether the answer is passed on while it comes: events, or what nothing is known of."""
        status: int = response.status_code
        if not status < _REDIRECTS:
            return False
        return self.read.route is Route.OTHER or _is_events(response.headers)

    def reader(self, permit: Permit, response: Any) -> Reader:
        """What meters an open answer, and closes its permit."""
        self.desk.hear(permit, notices(Plain.of_wire(response.headers.raw), wall=clock.wall_time()))
        self.desk.accepted(permit)
        meter = None
        if _is_events(response.headers):
            meter = Meter(stream=True, input_tokens=self.ask.charge.input_tokens)
        judged = self.read.makes_tokens
        return Reader(self, permit, meter, UsageFilter() if self.filtered else None, judged=judged)

    def open(self, response: Any, stream: Any, *, decoded: bool) -> Tried:
        """The answer has begun."""
        changed = (
            {b"content-encoding", b"content-length"} if decoded else {b"content-length"} if self.filtered else set()
        )
        self._meaning = Meaning.SUCCESS
        return Tried(
            value=self._response(response, stream, without=changed), ended=Ended(outcome=Outcome.SUCCESS), open=True
        )

    def whole(self, permit: Permit, response: Any, raw: bytes) -> Tried:
        """The answer is all there."""
        http = self._binding.http
        headers, status = Plain.of_wire(response.headers.raw), response.status_code
        heard = notices(headers, wall=clock.wall_time())
        body = _decoded(http, headers, raw)
        meaning = self._meaning = meaning_of(status, headers, body)
        value = self._response(response, http.ByteStream(raw))
        if status >= _ERRORS:
            self._after = retry_after(headers, body, wall=clock.wall_time())
        if meaning in _NOT_NOW:
            return self._not_now(permit, headers, value, heard)
        self.desk.hear(permit, heard)
        if status >= _ERRORS:
            ended = Ended(outcome=meaning.outcome, used=_COUNTED, usd=0.0, seconds=clock.now() - permit.at)
            return self._tried(value, headers, ended)
        if status >= _REDIRECTS:
            return Tried(value=value, ended=Ended(outcome=Outcome.IGNORED, used=_COUNTED, usd=0.0))
        meter = Meter(stream=False, input_tokens=self.ask.charge.input_tokens)
        meter.feed(body)
        meter.end()
        if meter.error is not None:
            meaning = meter.error
        return Tried(value=value, ended=self.ended(permit, meaning.outcome, meter.usage))

    def _not_now(self, permit: Permit, headers: Mapping[str, str], value: Any, heard: tuple[Notice, ...]) -> Tried:
        """It was refused at the provider's door: nothing was used."""
        meaning = self._meaning
        after = self._after
        if meaning is Meaning.SPEND_CAP:
            self.desk.stop(_STOP if after is None else after)
        rate = meaning is Meaning.RATE
        if not rate:
            self.desk.hear(permit, heard)
        ended = Ended(
            outcome=meaning.outcome,
            released=not rate,
            rate=rate,
            retry_after=after,
            notices=heard if rate else (),
            usd=0.0,
        )
        return self._tried(value, headers, ended)

    def _tried(self, value: Any, headers: Mapping[str, str], ended: Ended) -> Tried:
        """An attempt that did not succeed; whether there may be another, the provider may say itself."""
        meaning = self._meaning
        told = None if meaning is Meaning.SPEND_CAP else wants_retry(headers)
        again = self._replayable and (meaning.retried if told is None else told)
        return Tried(value=value, ended=ended, again=again, counts=meaning.uses_attempt, retry_after=self._after)

    def broke(self, permit: Permit, error: Exception) -> Tried:
        """The connection failed, before the answer or within it.

        Raises:
            Exception: `error`, if that is not a connection's.
        """
        http = self._binding.http
        ours = (http.LocalProtocolError, http.UnsupportedProtocol, http.PoolTimeout)  # say nothing of the provider
        if not isinstance(error, http.RequestError | OSError):
            raise error
        ended = Ended(outcome=Outcome.FAULT, seconds=clock.now() - permit.at)
        if isinstance(error, (*ours, http.ConnectError, http.ConnectTimeout)):  # nothing was sent
            ended = Ended(outcome=Outcome.IGNORED if isinstance(error, ours) else Outcome.FAULT, released=True, usd=0.0)
        self._meaning = Meaning.FAULT
        again = self._replayable and not isinstance(error, ours)
        return Tried(error=self._failure(error), ended=ended, again=again)

    def _failure(self, error: Exception) -> Exception:
        http = self._binding.http
        if isinstance(error, http.RequestError):
            _gave_up.set((type(error), str(error)))
            error.request = self._original
        return self._dress.failure(error, self._original, timeout=isinstance(error, http.TimeoutException))

    # --- what the account hears ---

    def ended(self, permit: Permit, outcome: Outcome, usage: Usage | None) -> Ended:
        """How a call ended that was answered, with what it used."""
        seconds = clock.now() - permit.at
        if usage is None:
            return Ended(outcome=outcome, seconds=seconds)
        reserved = self.ask.charge
        used = self._binding.upstream.rules.settle(reserved, usage)
        made = Charge(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
        usd = self._binding.upstream.dollars(self.ask.model, made, cached_tokens=usage.cache_read_tokens)
        stretch = None
        if outcome is Outcome.SUCCESS:
            stretch = self.desk.learn(self.read.input_tokens, usage, used, seconds)
        return Ended(outcome=outcome, used=used, usd=usd, seconds=seconds, stretch=stretch)

    def _response(self, response: Any, stream: Any, *, without: Collection[bytes] = ()) -> Any:
        """The answer as its caller gets it: with this body, and not to be tried again by anybody else."""
        dropped = {b"x-should-retry", *without}
        headers = [pair for pair in response.headers.raw if pair[0].lower() not in dropped]
        headers.append((b"x-should-retry", b"false"))
        return self._binding.http.Response(
            response.status_code, headers=headers, stream=stream, extensions=response.extensions
        )


def _key(headers: Mapping[str, str]) -> str:
    """The API key of a request, or nothing."""
    for name in ("authorization", "x-api-key", "api-key"):
        if key := headers.get(name):
            return key
    return ""


def _is_events(headers: Mapping[str, str]) -> bool:
    kind: str = headers.get("content-type", "")
    return kind.lower().startswith("text/event-stream")


def _decoded(http: ModuleType, headers: Any, raw: bytes) -> bytes:
    """The body without its content-encoding; as it is where that is none, or not to be understood."""
    encoding = headers.get("content-encoding")
    if encoding is None:
        return raw
    try:
        content: bytes = http.Response(200, headers={"content-encoding": encoding}, content=raw).content
    except http.DecodingError:
        return raw
    return content
