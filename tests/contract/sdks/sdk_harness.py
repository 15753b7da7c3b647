"""The SDKs of both providers, and the two paths of their calls through an upstream: a bound client, and a gateway.

Tests are the same for each SDK, each path, and for plain and awaited calls: they make a call, and check what the user
of the SDK gets. They have no event loop of their own.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final, Self, cast

import anthropic
import httpx
import httpx2
import openai
from tests.contract.sdks.serving import run_gateway
from tests.unit.upstream.httpx_binding.wire import NOTHING, left

from forebay import Deadline, Overloaded, Task, clock, context
from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway
from forebay.retry import Retry
from forebay.upstream import Upstream

MESSAGES: Final[list[Any]] = [{"role": "user", "content": "Tell me of rivers."}]
KEY: Final = "sk-suite"
_TIMEOUT: Final = 30.0  # seconds for what other threads and processes do


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another thread or process brings about."""
    end = clock.now() + _TIMEOUT
    while not condition():
        assert clock.now() < end, "the condition did not become true"
        threading.Event().wait(0.002)


class QuickTarget(TargetSettings, frozen=True, kw_only=True):
    """A target whose calls are retried at once."""

    @property
    def retry(self) -> Retry:
        return replace(super().retry, base_delay=0.001, max_delay=0.01)


@dataclass(frozen=True)
class Sdk:
    """One SDK, sync or async.

    Attributes:
        name: of its provider.
        awaits: whether its calls are awaited.
    """

    name: str
    awaits: bool

    def __str__(self) -> str:
        return f"{self.name}-{'async' if self.awaits else 'sync'}"

    @property
    def module(self) -> Any:
        return openai if self.name == "openai" else anthropic

    @property
    def model(self) -> str:
        return "gpt-4o-mini" if self.name == "openai" else "claude-sonnet-5"

    @property
    def base_error(self) -> type[Exception]:
        return openai.OpenAIError if self.name == "openai" else anthropic.AnthropicError

    @property
    def http(self) -> ModuleType:
        """Return the HTTP library of this version of the SDK."""
        return httpx2 if issubclass(openai._base_client.SyncHttpxClientWrapper, httpx2.Client) else httpx

    @property
    def broken(self) -> tuple[type[Exception], ...]:
        """Return the errors for a response that breaks off; which of them is raised depends on the SDK."""
        return (self.module.APIError, self.http.TransportError)

    @property
    def request_id(self) -> str:
        """Return the header with the provider's id of a request."""
        return "x-request-id" if self.name == "openai" else "request-id"

    def client(self, url: str, **options: Any) -> Any:
        """Return a client of the provider at `url`, which is the part before ``/v1``."""
        kind = ("Async" if self.awaits else "") + ("OpenAI" if self.name == "openai" else "Anthropic")
        return getattr(self.module, kind)(base_url=self.base_url(url), **{"api_key": KEY, **options})

    def base_url(self, url: str) -> str:
        """Return the base URL of a client of the provider at `url`."""
        return f"{url}/v1" if self.name == "openai" else url

    def create(self, client: Any, **fields: Any) -> Any:
        fields = {"model": self.model, "messages": MESSAGES, "max_tokens": 40, **fields}
        return client.chat.completions.create(**fields) if self.name == "openai" else client.messages.create(**fields)

    def used(self, response: Any) -> tuple[int, int]:
        """Return the tokens sent and received, as a response reports them."""
        usage = response.usage
        if self.name == "openai":
            return usage.prompt_tokens, usage.completion_tokens
        return usage.input_tokens, usage.output_tokens

    def used_by(self, parts: list[Any]) -> tuple[int, int]:
        """Return the tokens sent and received, as the parts of a stream report them."""
        if self.name == "openai":
            return self.used(parts[-1])
        start, delta = (next(part for part in parts if part.type == f"message_{end}") for end in ("start", "delta"))
        return self.used(start.message)[0], delta.usage.output_tokens

    def text(self, parts: list[Any]) -> str:
        """Return the text of the parts of a stream."""
        if self.name == "openai":
            return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        return "".join(part.delta.text for part in parts if part.type == "content_block_delta")


SDKS: Final = [Sdk(name, awaits) for name in ("openai", "anthropic") for awaits in (False, True)]


@dataclass
class _Running:
    """A running task, for the calls that are made in it."""

    task: Task
    deadline: Deadline | None
    attempt: int = 1
    submission: float = 0.0
    tenant_weight: float = 1.0

    def report(self, value: Any) -> None:
        raise NotImplementedError(value)


class SdkCaller:
    """A user of an SDK's client, who gets what its methods return, awaited if the client is async."""

    def __init__(self, sdk: Sdk, client: Any, runner: asyncio.Runner, deadline: Deadline | None = None) -> None:
        self.sdk = sdk
        self.client = client
        self._runner = runner
        self._deadline = deadline

    def with_options(self, **options: Any) -> SdkCaller:
        """Return the same caller with other options of the client."""
        return SdkCaller(self.sdk, self.client.with_options(**options), self._runner, self._deadline)

    def in_a_task(self, deadline: Deadline) -> SdkCaller:
        """Return the same caller, inside a task with this deadline."""
        return SdkCaller(self.sdk, self.client, self._runner, deadline)

    @contextlib.contextmanager
    def _task(self) -> Iterator[None]:
        token = context.set_running_task(_Running(Task("research"), self._deadline) if self._deadline else None)
        try:
            yield
        finally:
            token.var.reset(token)

    def do(self, call: Callable[[Any], Any]) -> Any:
        """Return the result of `call` with the client."""
        if not self.sdk.awaits:
            with self._task():
                return call(self.client)

        async def run() -> Any:
            with self._task():
                result = call(self.client)
                return await result if inspect.isawaitable(result) else result

        return self._runner.run(run())

    def create(self, **fields: Any) -> Any:
        """Return one response, whole."""
        return self.do(lambda client: self.sdk.create(client, **fields))

    def parts(self, **fields: Any) -> list[Any]:
        """Return the parts of one streamed response."""
        return self.read(lambda client: self.sdk.create(client, stream=True, **fields))

    def read(self, call: Callable[[Any], Any]) -> list[Any]:
        """Return the items of the result of `call`: of a stream, or of a page."""
        if not self.sdk.awaits:
            return list(call(self.client))

        async def run() -> list[Any]:
            result = call(self.client)
            return [part async for part in (result if hasattr(result, "__aiter__") else await result)]

        return self._runner.run(run())

    def start_stream(self, **fields: Any) -> OpenStream:
        """Return a stream of which one part has been read."""
        stream = OpenStream(self, self.do(lambda client: self.sdk.create(client, stream=True, **fields)))
        stream.next()
        return stream

    def many(self, number: int, **fields: Any) -> list[Any]:
        """Return `number` responses to calls made at once."""
        if not self.sdk.awaits:
            with ThreadPoolExecutor(number) as pool:
                return [call.result() for call in [pool.submit(self.create, **fields) for _ in range(number)]]

        async def run() -> list[Any]:
            return await asyncio.gather(*[self.sdk.create(self.client, **fields) for _ in range(number)])

        return self._runner.run(run())

    def close(self) -> None:
        if self.sdk.awaits:
            self._runner.run(self.client.close())
        else:
            self.client.close()


class OpenStream:
    """A stream that is read part by part."""

    def __init__(self, caller: SdkCaller, stream: Any) -> None:
        self._caller = caller
        self._parts = aiter(stream) if caller.sdk.awaits else iter(stream)
        self._stream = stream

    def next(self) -> Any:
        awaits = self._caller.sdk.awaits
        return self._caller.do(lambda _: anext(self._parts) if awaits else next(self._parts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the stream."""
        self._caller.do(lambda _: self._stream.close())


class CallPath(abc.ABC):
    """A path of calls to an upstream.

    Args:
        caller: makes the calls.
        upstream: paces them.
    """

    name: str

    def __init__(self, caller: SdkCaller, upstream: Upstream) -> None:
        self.caller = caller
        self.upstream = upstream

    @property
    def sdk(self) -> Sdk:
        return self.caller.sdk

    @property
    def accounts(self) -> list[Any]:
        return [shared.account for shared in self.upstream.core.accounts]

    @abc.abstractmethod
    def is_idle(self) -> bool:
        """Return whether all calls have released what they held."""

    @abc.abstractmethod
    def within(self, seconds: float) -> SdkCaller:
        """Return the caller, with a deadline so many seconds from now."""

    @abc.abstractmethod
    def check_rejection(self, error: BaseException, status: int, limited_by: str) -> None:
        """Check that `error` is a rejection by the limit `limited_by`; over HTTP, with `status`."""


class BoundClient(CallPath):
    """A bound client, in this process."""

    name = "bind"

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: TargetSettings, bare: SdkCaller, runner: asyncio.Runner) -> Iterator[BoundClient]:
        upstream = target.upstream()
        yield cls(SdkCaller(bare.sdk, upstream.bind(bare.client), runner), upstream)

    def is_idle(self) -> bool:
        return left(self.upstream) == NOTHING  # at once, not after a while

    def within(self, seconds: float) -> SdkCaller:
        return self.caller.in_a_task(Deadline(clock.wall_time() + seconds))

    def check_rejection(self, error: BaseException, status: int, limited_by: str) -> None:
        del status  # nothing was sent
        assert isinstance(error, Overloaded)
        assert isinstance(error, self.sdk.base_error)
        assert error.__cause__ is None
        assert not hasattr(error, "status_code")
        assert not any(word in str(error).lower() for word in ("rate limit", "throttl", "too many requests"))
        assert (error.limited_by or "").rpartition(":")[2] == limited_by


class ThroughGateway(CallPath):
    """A client whose base URL is that of a gateway."""

    name = "gateway"
    gateway: Gateway
    url: str

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: TargetSettings, bare: SdkCaller, runner: asyncio.Runner) -> Iterator[ThroughGateway]:
        settings = GatewaySettings(targets=(target,), listen="127.0.0.1:0", drain_timeout=5.0)
        with run_gateway(settings) as gateway:
            url = f"http://127.0.0.1:{gateway.port}"
            client = bare.client.with_options(base_url=bare.sdk.base_url(url))
            (only_target,) = gateway.forwarder.targets
            path = cls(SdkCaller(bare.sdk, client, runner), only_target.upstream)
            path.gateway, path.url = gateway, url
            yield path

    def count_responses(self, status: int) -> int:
        """Return how many responses the gateway gave with this status."""
        labels = f'{{status="{status}",target="{self.sdk.name}"}}'
        metrics = self.gateway.forwarder.metrics.render().decode()
        found = re.search(re.escape(f"forebay_gateway_requests_total{labels} ") + r"(\d+)", metrics)
        return int(found[1]) if found else 0

    def is_idle(self) -> bool:
        until(
            lambda: left(self.upstream) == NOTHING
        )  # the gateway may still be finishing when its caller has the whole response
        return True

    def within(self, seconds: float) -> SdkCaller:
        return self.caller.with_options(default_headers={"x-forebay-deadline": str(clock.wall_time() + seconds)})

    def check_rejection(self, error: BaseException, status: int, limited_by: str) -> None:
        sdk = self.sdk.module
        classes = {429: sdk.RateLimitError, 503: sdk.InternalServerError}  # the SDKs differ in the others
        assert isinstance(error, classes.get(status, sdk.APIStatusError))
        assert error.status_code == status
        assert error.response.headers["x-forebay-limited-by"].rpartition(":")[2] == limited_by
        assert isinstance(error.body, dict)
        body = error.body if self.sdk.name == "openai" else error.body["error"]
        assert body["message"]
        assert body["code"] == "forebay_overloaded"
        assert body["type"].endswith(("_error", "_quota", "_too_large"))


CALL_PATHS: Final[list[Any]] = [BoundClient, ThroughGateway]


class SdkHarness:
    """A maker of callers, which it closes at the end.

    Args:
        path: of their calls.
        sdk: that they use.
        stack: closes them.
    """

    def __init__(self, path: Any, sdk: Sdk, stack: contextlib.ExitStack) -> None:
        self.sdk = sdk
        self._path = path
        self._stack = stack
        self._runner = stack.enter_context(asyncio.Runner())
        self._first = SdkCaller(sdk, sdk.client("http://nowhere.test"), self._runner)  # others are copies of it
        stack.callback(self._first.close)

    def bare(self, url: str, **options: Any) -> SdkCaller:
        """Return a caller of the provider itself, without retries."""
        return self._first.with_options(**{"base_url": self.sdk.base_url(url), "max_retries": 0, **options})

    def open(self, url: str, **target: Any) -> CallPath:
        """Return a path to the provider at `url`, of a client with retries; `target` has settings of the target."""
        bare = self.bare(url, max_retries=2)
        settings = {"name": self.sdk.name, "url": url, **target}
        return cast("CallPath", self._stack.enter_context(self._path.open(QuickTarget(**settings), bare, self._runner)))
