"""Bound clients: copies that keep the settings of the original, which stays unchanged."""

from __future__ import annotations

import gc
import importlib
import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypedDict

import anthropic
import httpx
import httpx2
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langgraph.graph import START, StateGraph
from pydantic import BaseModel
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Script

from forebay.errors import AlreadyBound, NotBindable, NotGuardable
from forebay.upstream import Upstream

LIBRARIES = pytest.mark.parametrize("http", [httpx, httpx2], ids=lambda http: http.__name__)


def is_bound(client: Any) -> bool:
    return hasattr(client._transport, "binding")


@LIBRARIES
def test_a_copy_keeps_the_settings_of_the_client(http: ModuleType) -> None:
    seen: list[Any] = []
    script, proxied = Script(http), Script(http)
    client = http.Client(
        transport=script.blocking(),
        mounts={"all://proxied.test": proxied.blocking(), "all://direct.test": None},
        base_url="https://provider.test/v1",
        auth=("name", "word"),
        headers={"x-mine": "1"},
        cookies={"crumb": "2"},
        params={"api-version": "3"},
        timeout=7.0,
        follow_redirects=True,
        max_redirects=4,
        event_hooks={"request": [seen.append], "response": []},
    )
    bound = Upstream("key").bind(client)
    assert type(bound) is type(client)
    assert bound.base_url == client.base_url
    assert bound.timeout == client.timeout
    assert (bound.follow_redirects, bound.max_redirects) == (True, 4)
    bound.post("/chat/completions", json=REQUEST)
    (request,) = script.requests
    assert request is seen[0]
    assert str(request.url) == URL + "?api-version=3"
    assert request.headers["x-mine"] == "1"
    assert request.headers["cookie"] == "crumb=2"
    assert request.headers["authorization"].startswith("Basic ")
    bound.get("https://proxied.test/")
    bound.get("https://direct.test/")
    assert (len(proxied.requests), len(script.requests)) == (1, 2)
    bound.headers["x-mine"] = "changed"
    bound.event_hooks = {}
    assert client.headers["x-mine"] == "1"
    assert client.event_hooks["request"] == [seen.append]
    assert not is_bound(client)


@LIBRARIES
def test_binding_again_returns_the_same_client_and_binding_to_another_upstream_is_an_error(http: ModuleType) -> None:
    upstream = Upstream("key")
    bound = upstream.bind(http.Client())
    assert upstream.bind(bound) is bound
    with pytest.raises(AlreadyBound, match=r"'key'.*'other'"):
        Upstream("other").bind(bound)


def test_sdk_clients_and_models_are_bound_to_one_upstream_too() -> None:
    upstream = Upstream("key", provider="openai")
    clients: list[Any] = [
        openai.AsyncOpenAI(api_key="k"),
        anthropic.Anthropic(api_key="k"),
        ChatOpenAI(api_key="k"),  # type: ignore[arg-type]
        ChatAnthropic(api_key="k", model="claude-x"),  # type: ignore[arg-type,call-arg]
    ]
    for client in clients:
        bound = upstream.bind(client)
        assert bound is not client
        assert upstream.bind(bound) is bound
        with pytest.raises(AlreadyBound):
            Upstream("other").bind(bound)


def test_an_sdk_client_keeps_its_settings_and_its_copies_stay_bound() -> None:
    client = openai.AsyncOpenAI(
        api_key="k", organization="o", base_url="https://x.test/v1", timeout=7.0, default_headers={"x-mine": "1"}
    )
    bound = Upstream("key", provider="openai").bind(client)
    assert isinstance(bound, openai.AsyncOpenAI)
    assert (bound.api_key, bound.organization, bound.timeout) == ("k", "o", 7.0)
    assert str(bound.base_url) == "https://x.test/v1/"
    assert bound.default_headers["x-mine"] == "1"
    assert client.max_retries == 2
    assert not is_bound(client._client)
    for copy in (bound, bound.with_options(timeout=3), bound.copy(api_key="other")):
        assert is_bound(copy._client)
        assert copy.max_retries == 0


def test_a_websocket_that_bypasses_the_upstream_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream("key", provider="openai")
    bound = upstream.bind(openai.AsyncOpenAI(api_key="k"))
    for over_http in (bound.chat.completions.create, bound.responses.create, bound.realtime.client_secrets.create):
        assert callable(over_http)  # these go through the upstream
    assert not caplog.records
    for client in (bound, bound, bound.with_options(timeout=3)):
        client.realtime.connect(model="gpt-realtime")
    (record,) = caplog.records
    assert "WebSocket" in record.message
    assert "'key'" in record.message
    assert "over HTTP" in record.message


@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
@pytest.mark.parametrize("where", ["responses", "realtime", "beta.responses", "beta.realtime", "realtime.translations"])
def test_each_place_where_the_sdk_opens_a_websocket_warns(
    kind: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bound = Upstream("key", provider="openai").bind(kind(api_key="k"))
    operator.attrgetter(where)(bound).connect(**({"model": "gpt-realtime"} if "realtime" in where else {}))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", [openai.OpenAI, anthropic.Anthropic])
def test_a_copy_with_an_http_client_of_its_own_is_bound_too(kind: Any) -> None:
    upstream = Upstream("key")
    bound: Any = upstream.bind(kind(api_key="k"))
    base = importlib.import_module(kind.__module__.partition(".")[0] + "._base_client")
    with (getattr(base, "httpx2", None) or base.httpx).Client() as http:
        for copy in (bound.with_options(http_client=http), bound.copy(http_client=http)):
            assert is_bound(copy._client)
            assert copy.max_retries == 0
            assert is_bound(copy.with_options(timeout=3)._client)
        assert not is_bound(http)
        with pytest.raises(AlreadyBound):
            bound.with_options(http_client=Upstream("other").bind(http))


def test_the_connections_of_a_client_that_is_dropped_stay_open() -> None:
    script = Script(httpx2)
    closed: list[bool] = []
    transport = script.blocking()
    transport.close = lambda: closed.append(True)
    client: Any = openai.OpenAI(api_key="k")
    client._client._transport = transport
    bound = Upstream("key", provider="openai").bind(client)
    http_client = client._client
    del client
    gc.collect()
    bound.chat.completions.create(**REQUEST)
    assert not closed
    del bound  # the HTTP client of the original stays open
    gc.collect()
    assert not closed
    http_client.close()
    assert closed


def test_all_clients_of_a_langchain_model_are_bound() -> None:
    upstream = Upstream("key", provider="openai")
    chat = ChatOpenAI(api_key="k")  # type: ignore[arg-type]
    bound = upstream.bind(chat)
    assert type(bound) is ChatOpenAI
    for part in (bound.root_client, bound.root_async_client, bound.client._client, bound.async_client._client):
        assert is_bound(part._client)
    assert bound.client._client is bound.root_client
    assert not is_bound(chat.root_client._client)
    embeddings = upstream.bind(OpenAIEmbeddings(api_key="k"))  # type: ignore[arg-type]
    assert is_bound(embeddings.client._client._client)
    assert is_bound(embeddings.async_client._client._client)
    claude: Any = upstream.bind(ChatAnthropic(api_key="k", model="claude-x"))  # type: ignore[arg-type,call-arg]
    assert is_bound(claude._client._client)
    assert is_bound(claude._async_client._client)


@pytest.mark.parametrize(
    "thing", [object(), "client", None, DeterministicFakeEmbedding(size=3), httpx2.HTTPTransport()]
)
def test_the_error_for_an_unsupported_object_names_the_gateway(thing: Any) -> None:
    with pytest.raises(NotBindable, match="forebay gateway") as raised:
        Upstream("key").bind(thing)
    assert isinstance(raised.value, TypeError)


class Answer(BaseModel):
    """An answer as an object."""

    river: str


def bound_models(part: Any) -> Iterator[bool]:
    """Yield for each model of a LangChain chain whether it is bound."""
    if isinstance(part, ChatOpenAI):
        yield is_bound(part.root_client._client)
    elif isinstance(part, dict | list | tuple):
        for each in part.values() if isinstance(part, dict) else part:
            yield from bound_models(each)
    elif isinstance(part, Runnable):
        yield from bound_models(vars(part))


@pytest.mark.parametrize(
    "made",
    [
        lambda model: model.bind_tools([Answer]),
        lambda model: model.with_structured_output(Answer),
        lambda model: model.with_structured_output(Answer, include_raw=True),
        lambda model: model.with_config(tags=["x"]),
        lambda model: model.with_fallbacks([model]),
        lambda model: PromptTemplate.from_template("{what}") | model | StrOutputParser(),
        lambda model: {"a": model, "b": model} | StrOutputParser(),
    ],
    ids=["bind_tools", "structured", "structured, raw", "config", "fallbacks", "chain", "parallel"],
)
def test_the_models_in_a_chain_of_langchain_are_bound(made: Callable[[Any], Any]) -> None:
    upstream = Upstream("key")
    chain = made(ChatOpenAI(api_key="k", model="gpt-4o"))  # type: ignore[arg-type]
    bound = upstream.bind(chain)
    assert type(bound) is type(chain)
    assert list(bound_models(bound))
    assert all(bound_models(bound))
    assert not any(bound_models(chain))
    assert upstream.bind(bound) is bound
    assert list(bound_models(made(upstream.bind(ChatOpenAI(api_key="k", model="gpt-4o")))))  # type: ignore[arg-type]


def test_a_model_that_langchain_retries_is_refused_with_what_to_write() -> None:
    chat = ChatOpenAI(api_key="k")  # type: ignore[arg-type]
    for made in (chat.with_retry(), PromptTemplate.from_template("{what}") | chat.with_retry()):
        with pytest.raises(NotBindable, match=r"Leave out \.with_retry\(\)"):
            Upstream("key").bind(made)


class State(TypedDict):
    """The state of a graph."""

    answer: str


def test_a_graph_is_refused_with_what_to_write() -> None:
    graph = StateGraph(State).add_node("n", lambda state: state).add_edge(START, "n").compile()
    with pytest.raises(NotBindable, match="bind the model that the graph is made of"):
        Upstream("key").bind(graph)


def test_a_client_of_google_is_refused_with_what_to_write() -> None:
    client = type("Client", (), {"__module__": "google.genai.client"})()
    with pytest.raises(NotBindable, match=r"httpx_async_client.*upstream\.bind"):
        Upstream("key").bind(client)


def test_a_model_of_pydantic_ai_is_refused_with_what_to_write() -> None:
    model = type("OpenAIChatModel", (), {"__module__": "pydantic_ai.models.openai"})
    for kind in (model, type("Mine", (model,), {"__module__": "mine"})):
        with pytest.raises(NotBindable, match=r"openai_client=upstream\.bind.*UpstreamLimiter\(upstream\)"):
            Upstream("key").bind(kind())


def test_a_tool_that_is_no_function_is_not_guarded_and_what_to_write_is_told() -> None:
    made_tool = type("Tool", (), {"function": len})()
    with pytest.raises(NotGuardable, match=r"'Tool' cannot be guarded: .*Tool\(upstream\.guard\(function\)\)"):
        Upstream("search").guard(made_tool)


def instance(module: str, name: str) -> object:
    """Return an object of a class of that name, which is in a package that is not installed."""
    return type(name, (), {"__module__": module})()


@pytest.mark.parametrize(
    ("thing", "advice"),
    [
        (instance("agents.agent", "Agent"), r"agents\.agent\.Agent cannot.*set_default_openai_client\(upstream\.bind"),
        (type(instance("agents.run", "Runner")), r"agents\.run\.Runner.*set_default_openai_client\(upstream\.bind"),
        (instance("swarm.core", "Swarm"), r"config=\{'client': upstream\.bind\(AsyncOpenAI\(\)\)\}"),
        (instance("botocore.client", "BedrockRuntime"), "Guard the function that makes the call"),
        (ModuleType("litellm"), r"the module litellm cannot.*litellm\.aclient_session = upstream\.bind"),
        (openai.AsyncOpenAI, r"openai\..*AsyncOpenAI cannot.*upstream\.bind\(AsyncOpenAI\(\.\.\.\)\)"),
        (openai.AsyncOpenAI(api_key="k").chat.completions, "bind the client, and use that part of the copy"),
        (openai.AsyncOpenAI(api_key="k").chat.completions.create, r"Completions\.create cannot.*bind the client"),
        (instance, r"instance cannot.*upstream\.guard\(function\)"),
        (ModuleType("mine"), "the module mine cannot.*For anything else run the gateway"),
        ("gpt-4o", r"builtins\.str cannot.*bind takes clients"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_what_is_no_client_is_not_bound_and_what_to_write_is_told(thing: Any, advice: str) -> None:
    with pytest.raises(NotBindable, match=advice):
        Upstream("key").bind(thing)


@pytest.mark.parametrize(
    "thing", [None, "search", openai.AsyncOpenAI(api_key="k"), instance("agents.tool", "FunctionTool")]
)
def test_what_cannot_be_called_is_not_guarded_and_what_to_write_is_told(thing: Any) -> None:
    with pytest.raises(NotGuardable, match=r"not callable.*Tool\(upstream\.guard\(function\)\).*upstream\.bind"):
        Upstream("search").guard(thing)


def test_a_class_is_not_guarded_and_what_to_write_is_told() -> None:
    with pytest.raises(NotGuardable, match=r"'AsyncOpenAI'.*class.*upstream\.bind\(AsyncOpenAI\(\.\.\.\)\)"):
        Upstream("key").guard(openai.AsyncOpenAI)


def test_a_guarded_tool_of_langchain_stays_a_tool() -> None:
    upstream = Upstream("search")

    @tool
    def look_up(what: str) -> str:
        """Look something up."""
        return f"all about {what}"

    guarded: Any = upstream.guard(look_up)  # type: ignore[arg-type]
    assert isinstance(guarded, BaseTool)
    assert (guarded.name, guarded.description, guarded.args) == (look_up.name, look_up.description, look_up.args)
    assert guarded.invoke({"what": "rivers"}) == "all about rivers"
    assert upstream.statistics().accounts[0].succeeded == 1
    assert look_up.invoke({"what": "rivers"}) == "all about rivers"
    assert upstream.statistics().accounts[0].succeeded == 1


def test_a_tool_of_langchain_that_is_no_function_is_refused_with_what_to_write() -> None:
    class LookUp(BaseTool):
        name: str = "look_up"
        description: str = "Look something up."

        def _run(self, what: str) -> str:
            return what

    with pytest.raises(NotGuardable, match="Guard what its _run and _arun call"):
        Upstream("search").guard(LookUp())  # type: ignore[arg-type]


def test_bind_imports_what_the_first_call_would_import() -> None:
    code = (
        "import sys, openai; from forebay import Upstream; client = openai.AsyncOpenAI(api_key='sk-...');"
        " assert 'openai.resources' not in sys.modules; Upstream('key').bind(client);"
        " assert 'openai.resources' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
