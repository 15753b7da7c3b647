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

from forebay._validate import check_instance, check_positive, reject
from forebay.adapters.chat import ChatInput, ChatUsage, chat_handler
from forebay.adapters.gguf_server import Address, GgufServer, LocalModelNotInstalled
from forebay.adapters.handler import Handler
from forebay.context import progress
from forebay.errors import ForebayError, UnusableTask
from forebay.events import log

try:
    import aiohttp
except ImportError:
    if find_spec("aiohttp") is not None:
        raise  # it is installed, and broken
    raise LocalModelNotInstalled(library="aiohttp", extra="local-server") from None

_OWNER: Final = "LocalModel"
_OURS: Final = ("messages", "model", "stream", "stream_options", "n")  # fields of a request
_CONNECT_TIMEOUT: Final = 5.0  # seconds; the server is near
_POLL: Final = 0.2  # seconds between two looks at a server that is loading
_LONGEST_EVENT: Final = 1 << 20  # bytes of a line of a stream
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
        model: the name of the model; None: the first one that the server lists.
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
        parts = urlsplit(url if isinstance(url, str) else "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            reject(_OWNER, "url", url, 'the base URL of a server, such as "http://127.0.0.1:8080/v1"')
        check_instance(_OWNER, "model", model, str, example='"llama3.2"', optional=True)
        check_instance(_OWNER, "instructions", instructions, str, example='"Summarize."', optional=True)
        check_instance(_OWNER, "options", options, Mapping, example="{'temperature': 0.2}", optional=True)
        check_instance(_OWNER, "api_key", api_key, str, example="that of llama-server --api-key", optional=True)
        check_positive(_OWNER, "start_wait", start_wait, unit="seconds")
        for name in options or {}:
            if name in _OURS:
                reject(_OWNER, f"options[{name!r}]", "...", "left out: it is set for each call")
        self.model = model
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
        made = cls(model=Path(path).stem, instructions=instructions, options=options)
        made._server = GgufServer(path, slots=slots, context=context, threads=threads, params=params)
        made._slots = slots
        return made

    def __forebay_handler__(self) -> Handler:
        """Return the handler that runs tasks on this model."""
        handler = chat_handler(self._run, worker=self.model or self._address.url, config=None, options=frozenset())
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
                self._slots = await self._read_slots()
        except TimeoutError:
            why = f"it was not ready within {self._start_wait:g} s"
            raise LocalServerUnavailable(url=self._address.url, why=why) from None
        if self.model is None:
            self.model = listed

    async def _listed_model(self) -> str | None:
        """Return the first model that the server lists, once it has loaded it."""
        while True:
            async with _session(self._address) as session, session.get(f"{self._address.url}/models") as response:
                body = await response.read()
                if response.status == http.HTTPStatus.OK:
                    return _first_model(body)
                if response.status != http.HTTPStatus.SERVICE_UNAVAILABLE:
                    raise _failure(self._address, response.status, body)
            await asyncio.sleep(_POLL)

    async def _read_slots(self) -> int | None:
        root = self._address.url.removesuffix("/v1")
        async with _session(self._address) as session, session.get(f"{root}/props") as response:
            told = _decoded(await response.read()) if response.status == http.HTTPStatus.OK else {}
        slots = told.get("total_slots")
        return slots if isinstance(slots, int) and slots > 0 else None

    # --- a run ---

    async def _run(self, given: ChatInput, _: dict[str, Any]) -> dict[str, Any]:
        self._in_flight += 1
        try:
            self._check_slots()
            address = self._address if self._server is None else await self._server.address()
            return await self._ask(address, given.messages)
        finally:
            self._in_flight -= 1

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

    async def _ask(self, address: Address, messages: list[Any]) -> dict[str, Any]:
        sent = messages
        if self._instructions is not None and messages[0].get("role") not in ("system", "developer"):
            sent = [{"role": "system", "content": self._instructions}, *messages]
        request = {**self._options, "messages": sent, "stream": True, "stream_options": {"include_usage": True}}
        if self.model is not None:
            request["model"] = self.model
        url, body = f"{address.url}/chat/completions", msgspec.json.encode(request)
        usage, text, finished = ChatUsage(requests=1), [], False
        headers = {"content-type": "application/json"}
        async with _session(address) as session, session.post(url, data=body, headers=headers) as response:
            if response.status != http.HTTPStatus.OK:
                raise _failure(address, response.status, await response.read())
            async for event in _events(response.content):
                if "error" in event:
                    raise _failure(address, response.status, event)
                for choice in event.get("choices") or ():
                    finished = finished or choice.get("finish_reason") is not None
                    if delta := (choice.get("delta") or {}).get("content"):
                        text.append(delta)
                        progress({"text": delta})
                _count(event.get("usage"), usage)
        if not finished:
            raise LocalServerUnavailable(url=address.url, why="it ended a stream early")
        answer = "".join(text)
        return {
            "output": answer,
            "messages": [*messages, {"role": "assistant", "content": answer}],
            "agent": self.model,
            "usage": usage.as_dict(),
        }


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
        why = f"{type(error).__name__}: {str(error)[:_MOST_SHOWN]}"
        raise LocalServerUnavailable(url=address.url, why=why) from error


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of the events of a stream, up to its end."""
    async for line in content:
        name, _, value = line.strip().partition(b": ")
        if name == b"data" and value == b"[DONE]":
            return
        if name in (b"data", b"error"):  # llama.cpp has sent errors under a name of their own
            event = _decoded(value)
            yield event if name == b"data" else {"error": event}


def _decoded(body: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if it is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _first_model(body: bytes) -> str | None:
    listed = _decoded(body).get("data")
    first = listed[0] if isinstance(listed, list) and listed else None
    name = first.get("id") if isinstance(first, Mapping) else None
    return name if isinstance(name, str) else None


def _count(told: Any, usage: ChatUsage) -> None:
    if isinstance(told, Mapping):
        usage.input_tokens = told.get("prompt_tokens") or 0
        usage.output_tokens = told.get("completion_tokens") or 0


def _failure(address: Address, status: int, body: bytes | dict[str, Any]) -> ForebayError:
    """Return what a call is to raise that was answered with an error. A request that is refused is no fault."""
    told = (_decoded(body) if isinstance(body, bytes) else body).get("error")
    if isinstance(told, Mapping):
        code = told.get("code")
        status = code if status == http.HTTPStatus.OK and isinstance(code, int) else status
        told = told.get("message")
    message = told[:_MOST_SHOWN].rstrip(".") if isinstance(told, str) else "no message"
    failed = LocalModelFailed(url=address.url, status_code=status, message=message)
    if status not in _BAD_REQUESTS:
        return failed
    expected = f"a request that the local model server takes; it said: {message}"
    unusable = UnusableTask(field="payload", value="a conversation", expected=expected)
    unusable.__cause__ = failed
    return unusable
