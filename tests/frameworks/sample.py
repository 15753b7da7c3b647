"""Sample: an agent of one framework, as the contract suite needs it, and the facts that the suite measures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

MODEL: Final = "gpt-4o-mini"

#: A tool of the agent: takes a text and returns one.
Tool = Callable[[str], str]
#: Returns a client of a class of OpenAI's SDK, or an LLM on such clients, connected to the double, and bound if the
#: test has an upstream.
Connect = Callable[[Callable[..., Any]], Any]


def closeable(client: Any) -> Iterator[Any]:
    """Yield a client, or those that an LLM has, which are to be closed."""
    own = hasattr(client, "__enter__") or hasattr(client, "__aenter__")
    yield from (client,) if own else (client._client, client._async_client)


def as_it_is(prompt: str) -> str:
    """Return a prompt."""
    return prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the suite measures, a row of the table in docs/frameworks/index.md.

    Attributes:
        stops_at: where a cancelled run stops: "at once", or "next call", once its call has been answered.
        calls_if_direct: requests of one failing call, without an upstream.
        counts_usage: whether the tokens are in the result.
        threads_left: threads of a run that was cancelled in a plain tool and has ended.
        progress: what is reported: "steps", "text" or "no".
    """

    stops_at: str
    calls_if_direct: int
    counts_usage: bool
    threads_left: int
    progress: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcess:
    """An agent whose model answers without HTTP, to measure what its adapter costs.

    Attributes:
        arguments: handler= and config= of `register_worker`.
        ready: makes the agent, if it serves one run only, and returns what runs it as the framework itself does, in the
            running event loop.
    """

    arguments: Mapping[str, Any]
    ready: Callable[[], Callable[[str], Awaitable[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One way to run an agent.

    Attributes:
        name: of the framework and of the variant.
        make: returns the arguments handler= or factory=, and config=, of `register_worker` for an agent with one tool.
        facts: about it.
        streams: whether its calls are streamed.
        asked: returns what the submitter said, out of the first message of the user that the model is sent.
        payloads: "messages"; or "inputs", of which text and messages are the one that it needs, and the model is sent a
            conversation as one text; or "any inputs", of which it needs none.
        in_process: makes the agent with a model in process; None if another sample of the framework has it.
    """

    name: str
    make: Callable[[Connect, Tool], Mapping[str, Any]]
    facts: Facts
    streams: bool = False
    asked: Callable[[str], str] = as_it_is
    payloads: str = "messages"
    in_process: Callable[[Tool], InProcess] | None = None
