"""A saga: research (a LangGraph agent), summarize (writes a file), act (an HTTP POST). All take effect, or none.

... --crash-after summarize    it kills itself there; run it again without this, and it goes on where it was
... --fail                     the POST is refused, and the file is removed
"""

import asyncio
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TypedDict

import httpx
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import StateGraph

from forebay import BackpressureSupervisor, Task, TaskFailed
from forebay.saga import SagaRun, saga


class Journal(BaseHTTPRequestHandler):
    """The server that `act` posts to. It honours Idempotency-Key: a request that it knows has no second effect."""

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        entry = Path("published", f"{self.headers['Idempotency-Key'].replace('/', '-')}.md")
        if "--fail" not in sys.argv and not entry.exists():
            entry.parent.mkdir(exist_ok=True)
            entry.write_bytes(text)
        self.send_response(422 if "--fail" in sys.argv else 200)
        self.end_headers()
        self.wfile.write(json.dumps(str(entry)).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class State(TypedDict, total=False):
    topic: str
    notes: str


async def ask(state: State) -> State:
    show("research", f"asks a model about {state['topic']}")
    answer = await FakeListChatModel(responses=["They rise in the hills."]).ainvoke(state["topic"])
    return {"notes": str(answer.content)}


researcher = StateGraph(State).add_node("ask", ask).set_entry_point("ask").compile()  # your agent, as it is


def brief(key: str) -> Path:
    return Path(f"{key.replace('/', '-')}.md")


def summarize(found: State, *, key: str) -> str:
    show("summarize", f"writes {brief(key)}")
    brief(key).write_text(f"# {found['topic']}\n\n{found['notes']}\n")
    return str(brief(key))


def remove_summary(path: str | None, *, key: str) -> None:  # without a path if nobody knows how `summarize` has ended
    show("summarize", f"is undone: removes {path or brief(key)}")
    brief(key).unlink(missing_ok=True)


def act(path: str, url: str, *, key: str) -> str:
    show("act", f"posts {path}")
    answer = httpx.post(url, content=Path(path).read_bytes(), headers={"Idempotency-Key": key})
    return str(answer.raise_for_status().json())


@saga("publish")
async def publish(run: SagaRun, payload: dict[str, str]) -> str:
    found = await run.step("research", researcher, {"topic": payload["topic"]}, idempotent=True)
    crash_after("research")
    path = await run.step("summarize", summarize, found, compensate=remove_summary, idempotent=True)
    crash_after("summarize")
    entry: str = await run.step("act", act, path, journal_url, pivot=True, idempotent=True)
    crash_after("act")
    return entry


def show(step: str, does: str) -> None:
    print(f"{step:9} {does}", flush=True)


def crash_after(step: str) -> None:
    if sys.argv[1:] == ["--crash-after", step]:
        os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    # The lease is short, so that you need not wait: another process takes a saga once its lease has expired.
    async with BackpressureSupervisor(saga_log="sqlite:///saga.db", lease=2.0) as supervisor:
        supervisor.register_worker("publisher", handler=publish, task_types=["publish"])
        try:
            print("published", await supervisor.run(Task("publish", {"topic": "rivers"}, key="rivers")))
        except TaskFailed as failed:
            print(failed.__cause__)


server = ThreadingHTTPServer(("127.0.0.1", 0), Journal)
Thread(target=server.serve_forever, daemon=True).start()
journal_url = f"http://127.0.0.1:{server.server_port}"
asyncio.run(main())
