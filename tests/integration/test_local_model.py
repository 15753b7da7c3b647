"""A local model behind a server that speaks OpenAI's chat completions, as a worker's handler."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.llama_server import INPUT_TOKENS, OUTPUT_TOKENS, WORDS, LlamaServer, llama_server

from forebay import BackpressureSupervisor, Retry, Task, TaskFailed, TaskStatus, WorkerState
from forebay.adapters import gguf_server, local_model
from forebay.adapters.gguf_server import LocalModelNotInstalled
from forebay.adapters.local_model import LocalModel, LocalModelFailed, LocalServerUnavailable
from forebay.errors import InvalidSetting, UnusableTask
from forebay.events import TaskProgress
from forebay.simulation.provider import ProviderConfig, ProviderProcess, TokenPrice, start_provider
from forebay.upstream.sdk_exceptions import find_error_answer

ANSWER = "".join(WORDS)
BEGIN = b'data: {"choices": [{"delta": {"content": "hel"}}]}\n\n'
END = b'data: {"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@pytest.fixture
async def server() -> AsyncIterator[LlamaServer]:
    async with llama_server() as running:
        yield running


def register(supervisor: BackpressureSupervisor, model: LocalModel, **settings: Any) -> Any:
    return supervisor.register_worker("local", handler=model, task_types=["ask"], **settings)


# --- payload, result, progress ---------------------------------------------------------------------------------------


async def test_a_task_is_answered_by_the_server_and_its_result_is_that_of_every_chat_agent(server: LlamaServer) -> None:
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        result = await supervisor.run(Task("ask", "Which river?"))
        assert json.loads(json.dumps(result)) == result
        assert result == {
            "output": ANSWER,
            "messages": [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": ANSWER}],
            "agent": "tiny.gguf",
            "usage": {"requests": 1, "input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS},
            "finish_reason": "stop",
        }
        further = [*result["messages"], {"role": "user", "content": "And where?"}]
        await supervisor.run(Task("ask", {"messages": further, "context": {"user": "Ada"}}))
    assert server.bodies[1]["messages"] == further
    assert {body["model"] for body in server.bodies} == {"tiny.gguf"}


async def test_a_task_is_sent_with_the_options_the_instructions_and_the_key(server: LlamaServer) -> None:
    server.api_key = "k7"
    model = LocalModel(
        server.url + "/", model="llama3.2", instructions="Summarize.", options={"top_k": 3}, api_key="k7"
    )
    asked = {"role": "user", "content": "Which river?"}
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, model)
        result = await supervisor.run(Task("ask", "Which river?"))
        await supervisor.run(Task("ask", [{"role": "system", "content": "Translate."}, asked]))
    assert [body["messages"] for body in server.bodies] == [
        [{"role": "system", "content": "Summarize."}, asked],
        [{"role": "system", "content": "Translate."}, asked],
    ]
    assert [server.bodies[0][name] for name in ("top_k", "model")] == [3, "llama3.2"]
    assert result["messages"][0] == asked  # so that the next task may go to another worker


async def test_any_other_payload_is_refused_when_it_is_submitted(server: LlamaServer) -> None:
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        with pytest.raises(UnusableTask, match="a list of messages"):
            await supervisor.submit(Task("ask", {"topic": "rivers"}))
    assert not server.bodies


@pytest.mark.parametrize(
    "content", ["a lone \ud800", object(), float("nan"), b"bytes"], ids=["surrogate", "object", "nan", "bytes"]
)
async def test_a_conversation_that_json_cannot_carry_is_refused_when_it_is_submitted(
    server: LlamaServer, content: object
) -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, LocalModel(server.url))
        for _ in range(10):
            with pytest.raises(UnusableTask, match="plain data"):
                await supervisor.submit(Task("ask", [{"role": "user", "content": content}]))
        assert worker.state is WorkerState.IDLE
    assert not server.bodies


async def test_text_is_progress_as_it_arrives(server: LlamaServer) -> None:
    server.pause_after = 2
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        seen = []
        async for event in ticket.events():
            if isinstance(event, TaskProgress):
                seen.append(event.value)
                if len(seen) == 2:  # and not before: otherwise this never ends
                    server.go.set()
        assert seen == [{"text": word} for word in WORDS]


# --- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [0, 2])
async def test_a_cancelled_run_hangs_up_at_once(server: LlamaServer, words: int) -> None:
    server.pause_after = words
    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, LocalModel(server.url))
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await server.until_calls(1)
        ticket.cancel()
        await server.until_hung_up(1)
        assert (await ticket).status is TaskStatus.CANCELLED
        assert worker.current_tasks == 0


async def test_a_run_whose_time_is_up_hangs_up(server: LlamaServer) -> None:
    server.pause_after = 1
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url), timeout=0.2)
        result = await (await supervisor.submit(Task("ask", "Which river?")))
        await server.until_hung_up(1)
        assert result.status is TaskStatus.TIMED_OUT


# --- the start, and slots --------------------------------------------------------------------------------------------


async def test_a_server_that_is_loading_is_waited_for(server: LlamaServer) -> None:
    server.loading = 2
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        assert (await supervisor.run(Task("ask", "Which river?")))["output"] == ANSWER
    assert server.loading == 0


@pytest.mark.parametrize("answers", [True, False])
async def test_a_server_that_is_not_ready_in_time_is_an_error(server: LlamaServer, *, answers: bool) -> None:
    server.loading, server.hangs = 1000, not answers
    supervisor = BackpressureSupervisor()
    register(supervisor, LocalModel(server.url, start_wait=0.1))
    with pytest.raises(LocalServerUnavailable, match=r"not ready within 0\.1 s"):
        await supervisor.start()


async def test_a_server_that_is_down_at_the_start_is_an_error_that_names_its_url() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    supervisor = BackpressureSupervisor()
    register(supervisor, LocalModel(url))
    with pytest.raises(LocalServerUnavailable, match=url):
        await supervisor.start()


async def test_the_slots_of_a_server_are_known_before_its_worker_is_registered(server: LlamaServer) -> None:
    assert await LocalModel(server.url).slots() is None
    server.slots, server.loading = 3, 1
    assert await LocalModel(server.url).slots() == 3


@pytest.mark.parametrize(
    "props",
    ["hangs", b"garbage", b'{"total_slots": true}', b'{"total_slots": "4"}', b"[" * 99_999],
    ids=["hangs", "garbage", "bool", "text", "deep"],
)
async def test_a_server_that_does_not_tell_its_slots_is_used_without(
    server: LlamaServer, props: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.props_body = props
    monkeypatch.setattr(local_model, "_PROPS_WAIT", 0.1)
    assert await LocalModel(server.url, start_wait=5).slots() is None


async def test_a_server_that_hangs_up_instead_of_telling_its_slots_is_used_without(server: LlamaServer) -> None:
    server.props_body = None
    assert await LocalModel(server.url).slots() is None


async def test_the_first_model_of_a_server_is_read_at_each_start(server: LlamaServer) -> None:
    model = LocalModel(server.url)
    for name in ("tiny.gguf", "other.gguf"):
        server.model = name
        async with BackpressureSupervisor() as supervisor:
            register(supervisor, model)
            assert (await supervisor.run(Task("ask", "Which river?")))["agent"] == name
    assert [body["model"] for body in server.bodies] == ["tiny.gguf", "other.gguf"]


async def test_a_worker_with_more_slots_than_its_server_is_warned_of_once(
    server: LlamaServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.slots, server.pause_after = 2, 0
    with caplog.at_level(logging.WARNING, "forebay"):
        async with BackpressureSupervisor() as supervisor:
            register(supervisor, LocalModel(server.url), max_concurrent=4)
            tickets = [await supervisor.submit(Task("ask", "Which river?")) for _ in range(4)]
            await server.until_calls(4)
            server.go.set()
            await asyncio.gather(*tickets)
            tickets = [await supervisor.submit(Task("ask", "Which river?")) for _ in range(2)]
            await asyncio.gather(*tickets)
    (warned,) = caplog.messages
    assert warned == (
        "tiny.gguf runs 3 tasks at once and has 2 slots: the others wait in it, whatever their priority; register its"
        " worker with max_concurrent=2, or give the server more slots"
    )


async def test_a_worker_with_as_many_slots_as_its_server_is_not_warned_of(
    server: LlamaServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.slots = 2
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url), max_concurrent=2)
        tickets = [await supervisor.submit(Task("ask", "Which river?")) for _ in range(6)]
        assert all(result.success for result in await asyncio.gather(*tickets))
    assert not caplog.messages


# --- failures --------------------------------------------------------------------------------------------------------


async def test_an_error_of_the_server_fails_the_task_and_is_found_behind_it(server: LlamaServer) -> None:
    server.refusal = 404, {"error": {"message": "model 'tiny' not found"}}
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        result = await (await supervisor.submit(Task("ask", "Which river?")))
        assert result.status is TaskStatus.FAILED
        assert isinstance(result.cause, LocalModelFailed)
        assert "answered with 404: model 'tiny' not found." in str(result.cause)
        answer = find_error_answer(result.cause)
        assert answer is not None
        assert answer.status == 404


async def test_a_request_that_the_server_refuses_does_not_count_against_the_worker(server: LlamaServer) -> None:
    server.refusal = 400, {"error": {"code": 400, "message": "exceeds the available context size"}}
    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, LocalModel(server.url))
        for _ in range(10):
            result = await (await supervisor.submit(Task("ask", "Which river?")))
            assert isinstance(result.cause, UnusableTask)
            assert "exceeds the available context size" in str(result.cause)
        assert worker.state is WorkerState.IDLE


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([b'data: {"choices": [{"delta": {"content": "The"}}]}\n\n'], "ended a stream early"),
        ([b'data: {"error": {"code": 500, "message": "out of memory"}}\n\n'], "with 500: out of memory"),
        ([b'error: {"code": 500, "message": "out of memory"}\n\n'], "with 500: out of memory"),
        ([BEGIN, b'data: {"choices": [{"delta": {"content": "XX\n\n', END], "no chunk of a chat completion"),
        ([BEGIN, b'data: {"choices": "\xff"}\n\n', END], "no chunk of a chat completion"),
        ([b"data: [1, 2]\n\n", END], "no chunk of a chat completion"),
        ([b'data: {"choices": 5}\n\n', END], "no chunk of a chat completion"),
        ([b'data: {"choices": ["x"]}\n\n', END], "no chunk of a chat completion"),
        ([b'data: {"choices": [{"delta": "x"}]}\n\n', END], "no chunk of a chat completion"),
        ([b'data: {"choices": [{"delta": {"content": [1]}}]}\n\n', END], "no chunk of a chat completion"),
        ([b'data: {"more": ' + b"[" * 100_000 + b"\n\n", END], "no chunk of a chat completion"),
        ([b"data: " + b"x" * (3 << 20) + b"\n\n", END], "Got more than"),
        ([b'{"choices": [{"message": \n'], "no chunk of a chat completion"),
        ([b"<html>\n"], "holds no event"),
        ([], "holds no event"),
        ([b'data: {"error": "overloaded"}\n\n'], "overloaded"),
    ],
)
async def test_a_stream_that_fails_fails_its_task(server: LlamaServer, events: list[bytes], said: str) -> None:
    server.events = events
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        result = await (await supervisor.submit(Task("ask", "Which river?")))
    assert isinstance(result.cause, LocalModelFailed | LocalServerUnavailable)
    assert re.search(said, str(result.cause))
    assert ".." not in str(result.cause).replace("...", "")


async def test_a_comment_a_long_event_and_a_missing_usage_are_no_failure(server: LlamaServer) -> None:
    text = "long " * 50_000
    event = json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}).encode()
    server.events = [b": ping\n\n", b"data: " + event + b"\r\n\r\n", b"data: [DONE]\n\n"]
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        result = await supervisor.run(Task("ask", "Which river?"))
    assert result["output"] == text
    assert result["usage"] == {"requests": 1, "input_tokens": 0, "output_tokens": 0}


@pytest.mark.parametrize(
    "lines",
    [
        [BEGIN.replace(b": {", b":{", 1), b":ping\n\n", b"data:\n\n", END.replace(b"data: ", b"data:")],
        [b'{"choices": [{"message":\n', b'{"content": "hello"}, "finish_reason": "stop"}]}'],
        [b'data: {"error": null, "choices": null}\n\n', BEGIN, END],
    ],
    ids=["without a space", "not streamed", "null error"],
)
async def test_an_answer_in_another_valid_form_is_taken(server: LlamaServer, lines: list[bytes]) -> None:
    server.events = lines
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        result = await supervisor.run(Task("ask", "Which river?"))
    assert (result["output"], result["finish_reason"]) == ("hello", "stop")


async def test_an_answer_that_was_cut_says_so(server: LlamaServer) -> None:
    server.events = [BEGIN, END.replace(b'"stop"', b'"length"')]
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        assert (await supervisor.run(Task("ask", "Which river?")))["finish_reason"] == "length"


@pytest.mark.parametrize("tokens", ["abc", -5, 1.5, [1], True, None])
async def test_tokens_that_are_no_count_are_left_out(server: LlamaServer, tokens: object) -> None:
    usage = {"prompt_tokens": tokens, "completion_tokens": 3}
    server.events = [BEGIN, b"data: " + json.dumps({"usage": usage}).encode() + b"\n\n", END]
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        result = await supervisor.run(Task("ask", "Which river?"))
    assert result["usage"] == {"requests": 1, "input_tokens": 0, "output_tokens": 3}


async def test_no_more_of_an_error_is_read_than_can_be_shown(server: LlamaServer) -> None:
    server.endless_error = True
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, LocalModel(server.url))
        with pytest.raises(TaskFailed, match="answered with 500: no message"):
            await supervisor.run(Task("ask", "Which river?"))


@pytest.mark.parametrize(
    ("path", "is_hinted"), [("", True), ("/v1/chat/completions", True), ("/v1", False)], ids=["root", "call", "v1"]
)
async def test_a_url_that_is_not_the_base_url_is_hinted_at(server: LlamaServer, path: str, *, is_hinted: bool) -> None:
    model = LocalModel(server.url.removesuffix("/v1") + path)
    server.refusal = 404, {"error": {"message": "File Not Found.\n"}}
    with pytest.raises(LocalModelFailed, match=r"answered with 404: ") as raised:
        await model.__forebay_handler__().call(Task("ask", "Which river?"))
    assert ("It usually ends in /v1" in str(raised.value)) == is_hinted
    assert not str(raised.value).endswith("..")


@pytest.fixture
def process() -> Iterator[ProviderProcess]:
    prices = {"llama3.2": TokenPrice(input=0.0, output=0.0)}
    with start_provider(ProviderConfig(ttft=0.01, tpot=0.0001, prices=prices)) as running:
        yield running


async def test_tasks_go_to_the_other_worker_once_the_server_has_been_killed(process: ProviderProcess) -> None:
    async def heavy(task: Task) -> str:
        return f"heavy {task.payload}"

    retry = Retry(max_attempts=8, base_delay=0.001)
    async with BackpressureSupervisor() as supervisor:
        model = LocalModel(process.openai_url, model="llama3.2")
        worker = register(supervisor, model, max_concurrent=4, retry=retry)
        assert (await supervisor.run(Task("ask", "before")))["agent"] == "llama3.2"
        supervisor.register_worker("heavy", handler=heavy, task_types=["ask"], max_concurrent=4, retry=retry)
        os.kill(process.pid, signal.SIGKILL)
        results = [await supervisor.run(Task("ask", str(number))) for number in range(20)]
        assert results == [f"heavy {number}" for number in range(20)]
        while worker.state is not WorkerState.FAILED:  # it is avoided for its failures, until the other one is full
            await asyncio.gather(*(supervisor.run(Task("ask", "more")) for _ in range(8)))
        result = await (await supervisor.submit(Task("ask", "after")))
        assert (result.worker_id, result.success) == ("heavy", True)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "127.0.0.1:8080"}, "the base URL of a server"),
        ({"url": None}, "the base URL of a server"),
        ({"url": "http://[::1"}, "the base URL of a server"),
        ({"url": "http://127.0.0.1:99999/v1"}, "the base URL of a server"),
        ({"url": " http://127.0.0.1:8080/v1"}, "the base URL of a server"),
        ({"url": "http://127.0.0.1:8080/v1?x=1"}, "put at its end"),
        ({"url": "http://127.0.0.1:8080/v1#x"}, "put at its end"),
        ({"url": "http://ada:secret@127.0.0.1:8080/v1"}, r"url='\.\.\.'.*give api_key"),
        ({"api_key": "secret\r\nb: c"}, r"api_key='\.\.\.'"),
        ({"model": ""}, "non-empty"),
        ({"instructions": "\ud800"}, "valid Unicode"),
        ({"options": {"temperature": float("nan")}}, r"options\['temperature'\].*NaN"),
        ({"options": {"x": object()}}, r"options\['x'\]"),
        ({"options": {"x": "\ud800"}}, r"options\['x'\]"),
        ({"options": {1: 2}}, "plain data by text"),
        ({"model": 7}, '"llama3.2"'),
        ({"instructions": ["Summarize."]}, '"Summarize."'),
        ({"options": "fast"}, "temperature"),
        ({"options": {"stream": False}}, "left out"),
        ({"start_wait": 0}, "seconds"),
    ],
)
def test_an_invalid_argument_is_an_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        LocalModel(**settings)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="a GGUF file that exists"):
        LocalModel.from_gguf(tmp_path / "none.gguf")


def test_a_file_without_the_library_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_server, "find_spec", lambda _: None)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(LocalModelNotInstalled, match=r"pip install 'forebay\[local\]'"):
        LocalModel.from_gguf(tmp_path / "tiny.gguf")


def test_a_server_without_the_library_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "forebay.adapters.local_model")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LocalModelNotInstalled, match=r"pip install 'forebay\[local-server\]'"):
        import forebay.adapters.local_model  # noqa: F401, PLC0415
