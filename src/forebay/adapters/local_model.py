"""A local model as a handler: any server that speaks OpenAI's chat completions, or a GGUF file through llama.cpp.

llama.cpp's server, which tests run, treats a call as follows. docs/howto/local.md has what others say of themselves.

- ``/props`` tells how many calls it serves at a time (`total_slots`). Further ones wait in it, in their order.
- While it loads a model it answers 503 to everything.
- A call whose connection is closed is stopped in the middle of its answer, within about a second.
- A conversation that is too long is refused with 400, before anything is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
from collections.abc import AsyncIterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import msgspec

from forebay._validate import check_instance, check_name, check_positive, is_whole, reject
from forebay.adapters.chat import ChatInput, ChatUsage, chat_handler, chat_input
from forebay.adapters.gguf_server import Address, GgufServer, LocalModelNotInstalled, check_plain, to_json
from forebay.adapters.handler import Handler
from forebay.context import progress
from forebay.errors import ForebayError, UnusableTask
from forebay.events import log
from forebay.task import Task

try:
    import aiohttp
    from aiohttp.http_exceptions import HttpProcessingError
except ImportError:
    if find_spec("aiohttp") is not None:
        raise  # it is installed, and broken
    raise LocalModelNotInstalled(library="aiohttp", extra="local-server") from None

_OWNER: Final = "LocalModel"
_OURS: Final = ("messages", "model", "stream", "stream_options", "n")  # fields of a request
_CONNECT_TIMEOUT: Final = 5.0  # seconds; the server is near
_POLL: Final = 0.2  # seconds between two looks at a server that is loading
_LONGEST_EVENT: Final = 1 << 20  # bytes of a line of a stream; aiohttp takes twice as many
_LONGEST_BODY: Final = 4 << 20  # bytes of an answer that is no stream
_PROPS_WAIT: Final = 2.0  # seconds in which a server must tell its slots, which most do not know
_MOST_SHOWN: Final = 200  # characters of a server's message
# A request that a server understands and refuses. 404 is not one: it has no such model.
_BAD_REQUESTS: Final = frozenset({http.HTTPStatus.BAD_REQUEST, http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, 422})


class LocalServerUnavailable(ForebayError, ConnectionError):
    """The local model server at {url} cannot be used: {why}. Check that it runs at this URL."""


class LocalModelFailed(ForebayError, RuntimeError):
    """The local model server at {url} answered with {status_code}: {message}."""

    status_code: int


class LocalModel:
    """A local model, to be registered as a handler. It takes and returns what the chat agents of frameworks do.

    A call is streamed: its text is progress as it arrives, ``{"text": ...}``. Cancelled, it closes its connection.

    Args:
        url: the base URL of a server with OpenAI's chat completions.
        model: the name of the model; None: the first one that the server lists at the start of a worker.
        instructions: a system message before each conversation that has none.
        options: further fields of each request, such as ``{"temperature": 0.2, "max_tokens": 300}``.
        api_key: that the server asks for.
        start_wait: seconds in which a server that is loading, and answers 503, must be ready at the start of a worker.

    Raises:
        InvalidSetting: an argument is invalid.
    """

    def __init__(  # noqa: PLR0913 - each a property of the model
        self,
        url: str = "http://127.0.0.1:8080/v1",
        *,
        model: str | None = None,
        instructions: str | None = None,
        options: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        start_wait: float = 60.0,
    ) -> None:
        _check_url(url)
        check_instance(_OWNER, "model", model, str, example='"llama3.2"', optional=True)
        check_instance(_OWNER, "instructions", instructions, str, example='"Summarize."', optional=True)
        for name, text in (("model", model), ("instructions", instructions)):
            if text is not None:
                check_name(_OWNER, name, text)
        check_instance(_OWNER, "options", options, Mapping, example="{'temperature': 0.2}", optional=True)
        check_instance(_OWNER, "api_key", api_key, str, example="that of llama-server --api-key", optional=True)
        if api_key is not None and not api_key.isprintable():
            reject(_OWNER, "api_key", "...", "text that can be sent in a header: without line breaks")
        check_positive(_OWNER, "start_wait", start_wait, unit="seconds")
        check_plain(_OWNER, "options", options)
        for name in options or {}:
            if name in _OURS:
                reject(_OWNER, f"options[{name!r}]", "...", "left out: it is set for each call")
        self.model = model
        self._takes_first_model = model is None
        self._address = Address(url.rstrip("/"), api_key or "")
        self._instructions = instructions
        self._options = dict(options or {})
        self._start_wait = start_wait
        self._server: GgufServer | None = None
        self._slots: int | None = None
        self._in_flight = 0
        self._has_warned = False

    @classmethod
    def from_gguf(  # noqa: PLR0913 - as above
        cls,
        path: str | Path,
        *,
        slots: int = 1,
        context: int = 4096,
        threads: int | None = None,
        params: Mapping[str, Any] | None = None,
        instructions: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> LocalModel:
        """Return the model of a GGUF file, which llama.cpp runs while workers use it. It needs ``forebay[local]``.

        The workers of all supervisors share it. It is loaded at the start of the first one, and freed when the last
        one has stopped. If llama.cpp crashes, it is loaded again at the next call.

        Args:
            path: of the file.
            slots: calls that are served at a time: the `max_concurrent` of its worker.
            context: tokens of each, its prompt and its answer; memory is taken for all of them.
            threads: that compute, at most the cores that are free: they wait for each other without sleeping. None: as
                many as llama.cpp takes by itself, most of the cores.
            params: fields of xllamacpp's CommonParams, such as ``{"n_gpu_layers": 0, "sampling.seed": 7}``.
            instructions: as for a `LocalModel`.
            options: as for a `LocalModel`.

        Raises:
            InvalidSetting: an argument is invalid, or the file is missing.
            LocalModelNotInstalled: the extra is missing.
        """
        server = GgufServer(path, slots=slots, context=context, threads=threads, params=params)
        made = cls(model=Path(path).stem, instructions=instructions, options=options)
        made._server = server
        made._slots = slots
        return made

    def __forebay_handler__(self) -> Handler:
        """Return the handler that runs tasks on this model."""
        worker = self.model or self._address.url
        handler = chat_handler(self._run, worker=worker, config=None, options=frozenset(), parse=_plain_chat_input)
        user = object()  # each worker is one, however often it is started and stopped
        start, stop = partial(self._start, user), partial(self._stop, user)
        return Handler(call=handler.call, check=handler.check, start=start, stop=stop)

    async def slots(self) -> int | None:
        """Return how many calls the server runs at a time; None if it does not say: only llama.cpp's does.

        It is the `max_concurrent` of its worker: further calls would wait in the server, outside of any priority.

        Raises:
            LocalServerUnavailable: it accepts no connection, or is not ready within `start_wait`.
            LocalModelFailed: it answers with an error.
        """
        if self._slots is None:
            await self._wait_until_ready()
        return self._slots

    # --- its life ---

    async def _start(self, user: object) -> None:
        """Load the model, or wait until the server has loaded it."""
        if self._server is not None:
            await self._server.start(user)
        else:
            await self._wait_until_ready()

    async def _stop(self, user: object) -> None:
        if self._server is not None:
            await self._server.stop(user)

    async def _wait_until_ready(self) -> None:
        """Wait while the server answers 503, then read which model it has and how many slots.

        Raises:
            LocalServerUnavailable, LocalModelFailed: as `slots` says.
        """
        try:
            async with asyncio.timeout(self._start_wait):
                listed = await self._listed_model()
        except TimeoutError:
            why = f"it was not ready within {self._start_wait:g} s"
            raise LocalServerUnavailable(url=self._address.url, why=why) from None
        self._slots = await self._read_slots()
        if self._takes_first_model:
            self.model = listed

    async def _listed_model(self) -> str | None:
        """Return the first model that the server lists, once it has loaded it."""
        while True:
            async with _session(self._address) as session, session.get(f"{self._address.url}/models") as response:
                body = await _read(response)
                if response.status == http.HTTPStatus.OK:
                    return _first_model(body)
                if response.status != http.HTTPStatus.SERVICE_UNAVAILABLE:
                    raise _failure(self._address, response.status, body)
            await asyncio.sleep(_POLL)

    async def _read_slots(self) -> int | None:
        """Return the slots; None if the server does not tell them, in whatever way."""
        url = self._address.url.removesuffix("/v1") + "/props"
        told: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError, LocalServerUnavailable):
            async with asyncio.timeout(_PROPS_WAIT), _session(self._address) as session, session.get(url) as response:
                if response.status == http.HTTPStatus.OK:
                    told = _decoded(await _read(response))
        slots = told.get("total_slots")
        return slots if is_whole(slots) else None

    # --- a run ---

    async def _run(self, given: ChatInput, _: dict[str, Any]) -> dict[str, Any]:
        self._in_flight += 1
        try:
            self._check_slots()
            answer = await self._ask(given.messages)
            return answer.result(given.messages, self.model)
        finally:
            self._in_flight -= 1

    async def _ask(self, messages: list[Any]) -> _Answer:
        """Make the call; once more, if its process has crashed before any text had arrived."""
        address, answer = self._address, _Answer()
        if self._server is not None:
            address = await self._server.address()
        try:
            await self._call(address, messages, answer)
        except LocalServerUnavailable:
            if self._server is None or answer.has_text or not await self._server.has_crashed(address):
                raise
            answer = _Answer()
            await self._call(await self._server.address(), messages, answer)
        return answer

    def _check_slots(self) -> None:
        if self._slots is not None and self._in_flight > self._slots and not self._has_warned:
            self._has_warned = True
            advice = "register its worker with max_concurrent=%d, or give the server more slots"
            log.warning(
                f"%s runs %d tasks at once and has %d slots: the others wait in it, whatever their priority; {advice}",
                self.model,
                self._in_flight,
                self._slots,
                self._slots,
            )

    async def _call(self, address: Address, messages: list[Any], answer: _Answer) -> None:
        sent = messages
        if self._instructions is not None and messages[0].get("role") not in ("system", "developer"):
            sent = [{"role": "system", "content": self._instructions}, *messages]
        request = {**self._options, "messages": sent, "stream": True, "stream_options": {"include_usage": True}}
        if self.model is not None:
            request["model"] = self.model
        url, body = f"{address.url}/chat/completions", to_json(request)
        headers = {"content-type": "application/json"}
        async with _session(address) as session, session.post(url, data=body, headers=headers) as response:
            if response.status != http.HTTPStatus.OK:
                raise _failure(address, response.status, await _read(response))
            try:
                async for event in _events(response.content):
                    if event.error is not None:
                        raise _failure(address, response.status, event)
                    answer.add(event)
            except _UnreadableEvent as error:
                message = f"an event that is no chunk of a chat completion: {error}"
                raise LocalModelFailed(url=address.url, status_code=response.status, message=message) from error
        if answer.finish_reason is None:
            why = "it ended a stream early" if answer.begun else "its answer holds no event of a stream"
            raise LocalServerUnavailable(url=address.url, why=why)


def _check_url(url: object) -> None:
    """Check that paths can be put at the end of a URL, and that it may be shown.

    Raises:
        InvalidSetting: it is not so.
    """
    expected = 'the base URL of a server, such as "http://127.0.0.1:8080/v1"'
    try:
        parts = urlsplit(url if isinstance(url, str) and url.isprintable() and " " not in url else "")
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        reject(_OWNER, "url", url, expected)
    assert isinstance(url, str)  # noqa: S101 - anything else was rejected
    if "@" in parts.netloc:
        reject(_OWNER, "url", "...", f"{expected}, without a user and a password: messages show it; give api_key")
    if "?" in url or "#" in url:
        reject(_OWNER, "url", url, f"{expected}, without what follows a ? or #: paths are put at its end")


def _plain_chat_input(task: Task, worker: str) -> ChatInput:
    """Return what a payload asks for, if it can be sent.

    Raises:
        UnusableTask: it is no conversation, or JSON cannot carry it.
    """
    given = chat_input(task, worker)
    try:
        to_json(given.messages)
    except ValueError:
        expected = "plain data: text without surrogates, numbers but not NaN, lists, and dicts by text"
        raise UnusableTask(field="payload", value="a conversation", expected=expected) from None
    return given


@contextlib.asynccontextmanager
async def _session(address: Address) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a session for one call. Its connection is no other call's: a server that was restarted closes old ones.

    Raises:
        LocalServerUnavailable: the connection cannot be made, or is lost.
    """
    headers = {"authorization": f"Bearer {address.key}"} if address.key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT)
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=_LONGEST_EVENT) as session:
            yield session
    except aiohttp.ClientError as error:
        why = f"{type(error).__name__}: {_clause(error)}"
        raise LocalServerUnavailable(url=address.url, why=why) from error


class _Message(msgspec.Struct):
    """A message, or a part of one."""

    content: str | None = None


class _Choice(msgspec.Struct):
    """An answer, or a part of one: `message` is that of a server that does not stream."""

    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    """A part of an answer, a whole one, or an error: what a server sends at a time."""

    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


class _UnreadableEvent(Exception):
    """It is no event, or too long."""


class _Answer:
    """The answer to a call, as it arrives.

    Attributes:
        begun: whether anything of it has arrived.
        finish_reason: why the model has ended it; None while it has not.
    """

    def __init__(self) -> None:
        self.begun = False
        self.finish_reason: str | None = None
        self._text: list[str] = []
        self._usage = ChatUsage(requests=1)

    @property
    def has_text(self) -> bool:
        """True if text of it has arrived, which was reported as progress."""
        return bool(self._text)

    def add(self, event: _Event) -> None:
        """Add what has arrived, and report its text as progress."""
        self.begun = True
        for choice in event.choices or ():
            self.finish_reason = self.finish_reason or choice.finish_reason
            part = choice.delta or choice.message
            if part is not None and part.content:
                self._text.append(part.content)
                progress({"text": part.content})
        if isinstance(event.usage, Mapping):
            self._usage.input_tokens = _tokens(event.usage.get("prompt_tokens"))
            self._usage.output_tokens = _tokens(event.usage.get("completion_tokens"))

    def result(self, messages: list[Any], agent: str | None) -> dict[str, Any]:
        """Return the result of the task."""
        text = "".join(self._text)
        return {
            "output": text,
            "messages": [*messages, {"role": "assistant", "content": text}],
            "agent": agent,
            "usage": self._usage.as_dict(),
            "finish_reason": self.finish_reason,
        }


def _tokens(told: Any) -> int:
    return told if is_whole(told, minimum=0) else 0


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[_Event]:
    """Yield the events of a stream up to its end; a server that does not stream sends one without its name.

    Raises:
        _UnreadableEvent: one is no JSON of an event, or is too long.
    """
    try:
        async for line in content:
            if line.lstrip().startswith(b"{"):
                yield _event(line + await _read_from(content))
                return
            name, _, value = line.strip().partition(b":")
            value = value.strip()
            if name == b"data" and value == b"[DONE]":
                return
            if name == b"data" and value:
                yield _event(value)
            elif name == b"error":  # llama.cpp has sent errors under a name of their own
                yield _Event(error=_decoded(value))
    except HttpProcessingError as error:  # of a line that is too long
        raise _UnreadableEvent(_clause(error)) from error


def _event(body: bytes) -> _Event:
    try:
        return msgspec.json.decode(body, type=_Event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _UnreadableEvent(_clause(error)) from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    return await _read_from(response.content)


async def _read_from(content: aiohttp.StreamReader) -> bytes:
    """Return a body, or the rest of one. Of one that is too long, only a part, which is no JSON then."""
    body = bytearray()
    async for part in content.iter_any():
        body += part
        if len(body) > _LONGEST_BODY:
            break
    return bytes(body)


def _decoded(body: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if it is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _first_model(body: bytes) -> str | None:
    listed = _decoded(body).get("data")
    first = listed[0] if isinstance(listed, list) and listed else None
    name = first.get("id") if isinstance(first, Mapping) else None
    return name if isinstance(name, str) else None


def _failure(address: Address, status: int, answer: bytes | _Event) -> ForebayError:
    """Return what a call is to raise that was answered with an error. A request that is refused is no fault."""
    told = answer.error if isinstance(answer, _Event) else _decoded(answer).get("error")
    if isinstance(told, Mapping):
        code = told.get("code")
        status = code if status == http.HTTPStatus.OK and is_whole(code) else status
        told = told.get("message")
    message = (_clause(told) if isinstance(told, str) else "") or "no message"
    if status == http.HTTPStatus.NOT_FOUND and not address.url.endswith("/v1"):
        message += "; is this the base URL? It usually ends in /v1"
    failed = LocalModelFailed(url=address.url, status_code=status, message=message)
    if status not in _BAD_REQUESTS:
        return failed
    expected = f"a request that the local model server takes; it said: {message}"
    unusable = UnusableTask(field="payload", value="a conversation", expected=expected)
    unusable.__cause__ = failed
    return unusable


def _clause(said: object) -> str:
    """Return the words of others in one line, cut, and without full stops at the end, where one follows."""
    return " ".join(str(said).split())[:_MOST_SHOWN].rstrip(". ")
