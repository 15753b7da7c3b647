"""The SDKs of both providers, and the two ways by which their calls go through an upstream.

A test is told which SDK, which way, and whether calls are awaited, and need not know: it says what is asked for, and
looks at what the SDK's caller gets. Nothing here runs on the test's own event loop, for it has none.
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

SAY: Final[list[Any]] = [{"role": "user", "content": "Tell me of rivers."}]
KEY: Final = "sk-suite"
_SOON: Final = 30.0  # seconds, within which what is under way elsewhere must have come about


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process brings about."""
    end = clock.now() + _SOON
    while not condition():
        assert clock.now() < end, "it has not come about"
        threading.Event().wait(0.002)


class QuickTarget(TargetSettings, frozen=True, kw_only=True):
    """A target that is asked again at once."""

    @property
    def retry(self) -> Retry:
        return replace(super().retry, base_delay=0.001, max_delay=0.01)


@dataclass(frozen=True)
class Sdk:
    """One SDK, for plain threads or awaited.

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
        """The HTTP library of this generation of the SDK."""
        return httpx2 if issubclass(openai._base_client.SyncHttpxClientWrapper, httpx2.Client) else httpx

    @property
    def broken(self) -> tuple[type[Exception], ...]:
        """What is raised by an answer that breaks off: which, is between the SDK and its HTTP library."""
        return (self.module.APIError, self.http.TransportError)

    @property
    def request_id(self) -> str:
        """The header that holds the provider's name for a request."""
        return "x-request-id" if self.name == "openai" else "request-id"

    def client(self, url: str, **how: Any) -> Any:
        """A client of a provider that is at `url`, the part before ``/v1``."""
        kind = ("Async" if self.awaits else "") + ("OpenAI" if self.name == "openai" else "Anthropic")
        return getattr(self.module, kind)(base_url=self.base_url(url), **{"api_key": KEY, **how})

    def base_url(self, url: str) -> str:
        """What a client is told of a provider that is at `url`."""
        return f"{url}/v1" if self.name == "openai" else url

    def create(self, client: Any, **how: Any) -> Any:
        how = {"model": self.model, "messages": SAY, "max_tokens": 40, **how}
        return client.chat.completions.create(**how) if self.name == "openai" else client.messages.create(**how)

    def used(self, answer: Any) -> tuple[int, int]:
        """Tokens sent and received, as an answer tells them."""
        usage = answer.usage
        if self.name == "openai":
            return usage.prompt_tokens, usage.completion_tokens
        return usage.input_tokens, usage.output_tokens

    def used_by(self, parts: list[Any]) -> tuple[int, int]:
        """The same of a stream."""
        if self.name == "openai":
            return self.used(parts[-1])
        began, ended = (next(part for part in parts if part.type == f"message_{end}") for end in ("start", "delta"))
        return self.used(began.message)[0], ended.usage.output_tokens

    def text(self, parts: list[Any]) -> str:
        """What the parts of a stream say."""
        if self.name == "openai":
            return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        return "".join(part.delta.text for part in parts if part.type == "content_block_delta")


SDKS: Final = [Sdk(name, awaits) for name in ("openai", "anthropic") for awaits in (False, True)]


@dataclass
class _Running:
    """A task that runs here."""

    task: Task
    deadline: Deadline | None
    attempt: int = 1

    def report(self, value: Any) -> None:
        raise NotImplementedError(value)


class SdkCaller:
    """Whoever uses an SDK's client, and gets what its methods return, awaited where they are to be."""

    def __init__(self, sdk: Sdk, client: Any, runner: asyncio.Runner, deadline: Deadline | None = None) -> None:
        self.sdk = sdk
        self.client = client
        self._runner = runner
        self._deadline = deadline

    def with_options(self, **options: Any) -> SdkCaller:
        """The same with other options."""
        return SdkCaller(self.sdk, self.client.with_options(**options), self._runner, self._deadline)

    def in_a_task(self, deadline: Deadline) -> SdkCaller:
        """The same, whose calls are made inside a task with this deadline."""
        return SdkCaller(self.sdk, self.client, self._runner, deadline)

    @contextlib.contextmanager
    def _task(self) -> Iterator[None]:
        token = context.set_running_task(_Running(Task("research"), self._deadline) if self._deadline else None)
        try:
            yield
        finally:
            token.var.reset(token)

    def do(self, call: Callable[[Any], Any]) -> Any:
        """What `call` makes of the client."""
        if not self.sdk.awaits:
            with self._task():
                return call(self.client)

        async def run() -> Any:
            with self._task():
                made = call(self.client)
                return await made if inspect.isawaitable(made) else made

        return self._runner.run(run())

    def create(self, **how: Any) -> Any:
        """One answer, whole."""
        return self.do(lambda client: self.sdk.create(client, **how))

    def parts(self, **how: Any) -> list[Any]:
        """One answer in pieces."""
        return self.read(lambda client: self.sdk.create(client, stream=True, **how))

    def read(self, call: Callable[[Any], Any]) -> list[Any]:
        """The parts of what `call` makes of the client: a stream, or a page of things."""
        if not self.sdk.awaits:
            return list(call(self.client))

        async def run() -> list[Any]:
            made = call(self.client)
            return [part async for part in (made if hasattr(made, "__aiter__") else await made)]

        return self._runner.run(run())

    def begin(self, **how: Any) -> OpenStream:
        """A stream, of which one part has been read."""
        stream = self.do(lambda client: self.sdk.create(client, stream=True, **how))
        opened = OpenStream(self, stream)
        opened.next()
        return opened

    def many(self, number: int, **how: Any) -> list[Any]:
        """So many answers, asked for at once."""
        if not self.sdk.awaits:
            with ThreadPoolExecutor(number) as pool:
                return [asked.result() for asked in [pool.submit(self.create, **how) for _ in range(number)]]

        async def run() -> list[Any]:
            return await asyncio.gather(*[self.sdk.create(self.client, **how) for _ in range(number)])

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
        """Give it up."""
        self._caller.do(lambda _: self._stream.close())


class CallPath(abc.ABC):
    """How calls reach an upstream.

    Args:
        caller: whose calls they are.
        upstream: which they go through.
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
        return [desk.account for desk in self.upstream.core.accounts]

    @abc.abstractmethod
    def is_idle(self) -> bool:
        """Whether all calls have given back what they held."""

    @abc.abstractmethod
    def within(self, seconds: float) -> SdkCaller:
        """The caller, to whom answers are worthless after so many seconds from now."""

    @abc.abstractmethod
    def check_rejection(self, error: BaseException, status: int, limited_by: str) -> None:
        """`error` is how Forebay refuses, for what `binding` says; over HTTP, with `status`."""


class BoundClient(CallPath):
    """A client that is bound, in this process."""

    name = "bind"

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: TargetSettings, bare: SdkCaller, runner: asyncio.Runner) -> Iterator[BoundClient]:
        upstream = target.upstream()
        yield cls(SdkCaller(bare.sdk, upstream.bind(bare.client), runner), upstream)

    def is_idle(self) -> bool:
        return left(self.upstream) == NOTHING  # now, and not some time

    def within(self, seconds: float) -> SdkCaller:
        return self.caller.in_a_task(Deadline(clock.wall_time() + seconds))

    def check_rejection(self, error: BaseException, status: int, limited_by: str) -> None:
        del status  # nobody was asked
        assert isinstance(error, Overloaded)
        assert isinstance(error, self.sdk.base_error)
        assert error.__cause__ is None
        assert not hasattr(error, "status_code")
        assert not any(word in str(error).lower() for word in ("rate limit", "throttl", "too many requests"))
        assert (error.limited_by or "").rpartition(":")[2] == limited_by


class ThroughGateway(CallPath):
    """A client whose base URL is a gateway's."""

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
            (made,) = gateway.forwarder.targets
            way = cls(SdkCaller(bare.sdk, client, runner), made.upstream)
            way.gateway, way.url = gateway, url
            yield way

    def count_responses(self, status: int) -> int:
        """How often it has answered so."""
        labels = f'{{status="{status}",target="{self.sdk.name}"}}'
        told = self.gateway.forwarder.metrics.render().decode()
        found = re.search(re.escape(f"forebay_gateway_requests_total{labels} ") + r"(\d+)", told)
        return int(found[1]) if found else 0

    def is_idle(self) -> bool:
        until(lambda: left(self.upstream) == NOTHING)  # the gateway may still be at it when its caller has it all
        return True

    def within(self, seconds: float) -> SdkCaller:
        return self.caller.with_options(default_headers={"x-forebay-deadline": str(clock.wall_time() + seconds)})

    def check_rejection(self, error: BaseException, status: int, limited_by: str) -> None:
        sdk = self.sdk.module
        classes = {429: sdk.RateLimitError, 503: sdk.InternalServerError}  # each SDK has others for the rest
        assert isinstance(error, classes.get(status, sdk.APIStatusError))
        assert error.status_code == status
        assert error.response.headers["x-forebay-limited-by"].rpartition(":")[2] == limited_by
        assert isinstance(error.body, dict)
        told = error.body if self.sdk.name == "openai" else error.body["error"]
        assert told["message"]
        assert told["code"] == "forebay_overloaded"
        assert told["type"].endswith(("_error", "_quota", "_too_large"))


CALL_PATHS: Final[list[Any]] = [BoundClient, ThroughGateway]


class SdkHarness:
    """Makes callers, and closes them.

    Args:
        way: by which they come.
        sdk: which they use.
    """

    def __init__(self, way: Any, sdk: Sdk, stack: contextlib.ExitStack) -> None:
        self.sdk = sdk
        self._way = way
        self._stack = stack
        self._runner = stack.enter_context(asyncio.Runner())
        self._first = SdkCaller(
            sdk, sdk.client("http://nowhere.test"), self._runner
        )  # of which others are quick copies
        stack.callback(self._first.close)

    def bare(self, url: str, **how: Any) -> SdkCaller:
        """A client before the provider itself, who asks once: what it gets is what the provider says."""
        return self._first.with_options(**{"base_url": self.sdk.base_url(url), "max_retries": 0, **how})

    def open(self, url: str, **target: Any) -> CallPath:
        """A client that would ask again, on its way to the provider at `url`; `target` is what a target may be told."""
        bare = self.bare(url, max_retries=2)
        given = {"name": self.sdk.name, "url": url, **target}
        return cast("CallPath", self._stack.enter_context(self._way.open(QuickTarget(**given), bare, self._runner)))
