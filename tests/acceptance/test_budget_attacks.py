"""A budget of one dollar, and callers who try to spend two."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from typing import Any

import httpx2
import pytest
from aiohttp import web
from tests.support.gateway_harness import CHAT_REQUEST, GatewayHarness
from tests.support.task_plane import virtual
from tests.unit.upstream.httpx_binding.wire import DONE, NOTHING, STOP, Reply, Script, chunk, left, words
from yarl import URL

from forebay import clock
from forebay.errors import Overloaded
from forebay.gateway.server import Gateway
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.upstream import Fallback, HttpRequest, HttpResponse, Upstream
from forebay.upstream.providers import usage_meter

DOLLAR = Budget(usd=1.0)
HALF = {"gpt-4o": Price(input=0.0, output=10_000.0)}  # the fifty tokens that CHAT_REQUEST asks for cost half a dollar
BODY = json.dumps(CHAT_REQUEST).encode()
JSON_TYPE = {"content-type": "application/json"}
PATH = "/openai/v1/chat/completions"


class Bill:
    """What the provider bills: half a dollar for each call that it serves, however that is spelt."""

    def __init__(self, harness: GatewayHarness) -> None:
        self.calls = 0
        harness.provider.behaviour = self.serve

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        self.calls += 1
        usage = {"prompt_tokens": 0, "completion_tokens": 50, "total_tokens": 50}
        return web.json_response({"id": "c", "choices": [], "usage": usage})


async def send(harness: GatewayHarness, gateway: Gateway, method: str, path: str, **how: Any) -> int:
    url = URL(harness.at(gateway, path), encoded=True)
    async with harness.session.request(method, url, **how) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize(
    ("method", "path", "headers", "body"),
    [
        ("POST", PATH, {"content-encoding": "identity"}, BODY),
        ("POST", PATH, {"content-encoding": "gzip"}, gzip.compress(BODY, mtime=0)),
        ("POST", PATH, {"content-encoding": "gzip"}, BODY),
        ("POST", PATH, {"content-encoding": "nonsense"}, BODY),
        ("POST", "/openai/v1/chat%2Fcompletions", {}, BODY),
        ("POST", "/openai/v1/chat%252Fcompletions", {}, BODY),
        ("POST", "/openai/v1/Chat/Completions", {}, BODY),
        ("POST", "/openai/V1/CHAT/COMPLETIONS", {}, BODY),
        ("POST", PATH + "/", {}, BODY),
        ("POST", PATH + ";x=1", {}, BODY),
        ("POST", PATH + "/x", {}, BODY),
        ("POST", PATH + "?model=gpt-4o-mini", {}, BODY),
        ("POST", PATH, {"content-type": "multipart/x; boundary=y"}, BODY),
        ("POST", PATH, {"content-type": "text/plain"}, BODY),
        ("POST", PATH, {"content-type": "application/json; charset=utf-16"}, CHAT_REQUEST),
        ("PUT", PATH, {}, BODY),
        ("PATCH", PATH, {}, BODY),
        ("GET", PATH, {"x-http-method-override": "POST"}, BODY),
        ("POST", PATH, {}, b"\xef\xbb\xbf" + BODY),
        ("POST", PATH, {}, json.dumps(CHAT_REQUEST).encode("utf-16")),
        ("POST", PATH, {}, BODY.replace(b'"model": "gpt-4o"', b'"model": "cheap", "model": "gpt-4o"')),
        ("POST", PATH, {}, BODY.replace(b'"model": "gpt-4o"', b'"model": "cheap", "mod\\u0065l": "gpt-4o"')),
        ("POST", "/openai/v1/responses", {}, b'{"model":"gpt-4o","input":"x","background":true}'),
        ("POST", "/openai/v1/images/variations", {}, BODY),
        ("POST", "/openai/v1/audio/transcriptions", {}, BODY),
        ("POST", "/openai/v1/batches", {}, b'{"input_file_id":"f","endpoint":"/v1/chat/completions"}'),
        ("POST", "/openai/v1/fine_tuning/jobs", {}, BODY),
        ("POST", "/openai/v1/videos", {}, BODY),
        ("POST", "/openai/v1/realtime/client_secrets", {}, BODY),
        ("POST", "/openai/v1/unheard-of", {}, BODY),
        ("POST", PATH, {}, BODY.replace(b"gpt-4o", b"gpt-4o-unheard-of")),
        ("POST", PATH, {}, b'{"messages":[{"role":"user","content":"x"}]}'),
        ("POST", "/anthropic/v1/messages/batches", {}, BODY),
        ("POST", "/anthropic/v1/complete", {}, BODY),
        ("POST", "/anthropic/v1/messages", {}, BODY.replace(b"50", b'50,"tools":[{"type":"code_execution_20250825"}]')),
    ],
)
async def test_no_spelling_of_a_call_spends_more_than_the_budget(
    harness: GatewayHarness, method: str, path: str, headers: dict[str, str], body: Any
) -> None:
    bill = Bill(harness)
    data = json.dumps(body).encode("utf-16") if isinstance(body, dict) else body
    async with Gateway(harness.settings(budget_usd=1.0, prices=HALF)) as gateway:
        statuses = [
            await send(harness, gateway, method, path, headers={**JSON_TYPE, **headers}, data=data) for _ in "six!!!"
        ]
    assert bill.calls * 0.5 <= 1.0, statuses
    assert set(statuses) <= {200, 400, 402, 404, 415}


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "says"),
    [
        (
            PATH,
            {"content-encoding": "gzip"},
            gzip.compress(BODY, mtime=0),
            415,
            "Content-Encoding 'gzip': send it as it is",
        ),
        (PATH, {}, BODY.replace(b'"model"', b'"model": "x", "model"'), 415, "a key twice"),
        ("/openai/v1/batches", {}, b"{}", 400, "its cost arises later, in a job"),
        (PATH, {}, BODY.replace(b"gpt-4o", b"mine"), 400, "no price is known for model 'mine'"),
        ("/anthropic/v1/messages/batches", {}, b"{}", 400, "its cost arises later, in a job"),
    ],
)
async def test_a_call_that_cannot_be_counted_is_told_why_and_which_setting_allows_it(  # noqa: PLR0913
    harness: GatewayHarness, *, path: str, headers: dict[str, str], body: bytes, status: int, says: str
) -> None:
    async with Gateway(harness.settings(budget_usd=1.0)) as gateway:
        answer = await harness.post(gateway, path, headers={**JSON_TYPE, **headers}, data=body)
        assert answer[0] == status
        assert answer[2]["error"]["type"] == "invalid_request_error"
        assert says in answer[2]["error"]["message"]
        setting = "unmetered='allow'" if status == 415 else "unpriced='warn'"
        assert setting in answer[2]["error"]["message"]
        assert answer[1]["x-should-retry"] == "false"
        assert not harness.provider.requests
        statistics = gateway.forwarder.targets[0].upstream.statistics()
        assert statistics.spent_usd == 0.0


async def test_calls_that_cannot_be_counted_pass_where_that_is_allowed(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(budget_usd=1.0, rpm=100, unmetered="allow")) as gateway:
        bill = Bill(harness)
        packed = {**JSON_TYPE, "content-encoding": "gzip"}
        assert (await harness.post(gateway, PATH, headers=packed, data=gzip.compress(BODY, mtime=0)))[0] == 200
        assert (await harness.post(gateway, "/openai/v1/batches", data=b"{}"))[0] == 200
        assert bill.calls == 2
        assert gateway.forwarder.targets[0].upstream.statistics().unpriced == 2


async def test_a_quota_rejects_what_cannot_be_read_too(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(tpm=1_000)) as gateway:
        packed = {**JSON_TYPE, "content-encoding": "gzip"}
        assert (await harness.post(gateway, PATH, headers=packed, data=gzip.compress(BODY, mtime=0)))[0] == 415
        assert (await harness.post(gateway, "/openai/v1/batches", data=b"{}"))[0] == 200  # it counts as one request


# --- through a bound client ---


def json_reply(*, pause: float = 0.0, **fields: Any) -> Reply:
    return Reply(body=[json.dumps(fields).encode()], headers={"content-type": "application/json"}, pause=pause)


def upstream_of(provider: str = "openai", **how: Any) -> Upstream:
    return Upstream(provider, provider=provider, budget=DOLLAR, **how)


def spent(upstream: Upstream) -> float:
    usd = upstream.statistics().spent_usd
    assert usd is not None
    return usd


OPENAI = "https://provider.test/v1"


async def post(script: Script, upstream: Upstream, path: str, **body: Any) -> Any:
    return await script.client(upstream).post(OPENAI + path, json=body)


@virtual
async def test_the_writes_to_a_cache_are_paid() -> None:
    usage = {
        "input_tokens": 0,
        "output_tokens": 0,
        "cache_creation_input_tokens": 20_000,
        "cache_creation": {"ephemeral_5m_input_tokens": 10_000, "ephemeral_1h_input_tokens": 10_000},
        "server_tool_use": {"web_search_requests": 3},
    }
    upstream = upstream_of("anthropic")
    await post(
        Script(httpx2, json_reply(type="message", usage=usage)),
        upstream,
        "/messages",
        model="claude-sonnet-4-5",
        max_tokens=1,
        messages=[],
    )
    assert spent(upstream) == pytest.approx(0.0375 + 0.06 + 0.03)


@virtual
@pytest.mark.parametrize(
    ("asked", "told", "factor"),
    [(None, "priority", 2.0), ("priority", "default", 1.0), ("flex", "flex", 0.5), ("priority", None, 2.0)],
)
async def test_the_tier_of_the_answer_is_paid(asked: str | None, told: str | None, factor: float) -> None:
    usage = {"prompt_tokens": 100_000, "completion_tokens": 0}
    upstream = upstream_of()
    reply = json_reply(usage=usage, service_tier=told)
    await post(
        Script(httpx2, reply),
        upstream,
        "/chat/completions",
        model="gpt-5",
        messages=[],
        service_tier=asked,
        max_tokens=1,
    )
    assert spent(upstream) == pytest.approx(factor * 0.125)


@virtual
async def test_images_are_paid_and_reserved() -> None:
    usage = {
        "input_tokens": 50,
        "output_tokens": 6_000,
        "total_tokens": 6_050,
        "input_tokens_details": {"text_tokens": 50, "image_tokens": 0},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 6_000},
    }
    upstream = upstream_of()
    script = Script(httpx2, json_reply(created=1, data=[], usage=usage))
    with pytest.raises(Overloaded, match="may cost 4"):
        await post(script, upstream, "/images/generations", model="gpt-image-1", prompt="a dam", n=10)
    await post(script, upstream, "/images/generations", model="gpt-image-1", prompt="a dam")
    assert spent(upstream) == pytest.approx(0.24025)
    with pytest.raises(Overloaded, match="no price is known for model 'dall-e-3'"):
        await post(script, upstream, "/images/generations", model="dall-e-3", prompt="a dam")


@virtual
async def test_speech_is_paid_by_the_character() -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply(body=[b"sound"], headers={"content-type": "audio/mpeg"}))
    await post(script, upstream, "/audio/speech", model="tts-1", input="x" * 10_000, voice="alloy")
    assert spent(upstream) == pytest.approx(0.15)
    with pytest.raises(Overloaded, match="no price is known for model 'gpt-4o-mini-tts'"):
        await post(script, upstream, "/audio/speech", model="gpt-4o-mini-tts", input="x", voice="alloy")


@virtual
async def test_sound_is_rejected_where_the_list_has_no_price_for_it() -> None:
    upstream = upstream_of()
    spoken = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]
    for body in ({"messages": spoken}, {"messages": [], "modalities": ["text", "audio"]}):
        with pytest.raises(Overloaded, match="no price is known"):
            await post(Script(httpx2), upstream, "/chat/completions", model="gpt-4o-audio-preview", **body)


@virtual
async def test_a_response_in_the_background_counts_as_reserved_until_its_usage_arrives() -> None:
    upstream = upstream_of()
    asked = {"model": "gpt-5", "input": "think", "background": True, "max_output_tokens": 50_000}
    script = Script(httpx2, json_reply(id="resp_1", status="queued", usage=None))
    await post(script, upstream, "/responses", **asked)
    assert spent(upstream) == pytest.approx(0.5, abs=1e-4)
    await script.client(upstream).get(OPENAI + "/responses/resp_1")
    assert spent(upstream) == pytest.approx(0.5, abs=1e-4), "it has not ended"
    unfinished = {"input_tokens": 0, "output_tokens": 0}
    script.replies = [json_reply(id="resp_1", status="in_progress", usage=unfinished)]
    await script.client(upstream).get(OPENAI + "/responses/resp_1")
    assert spent(upstream) == pytest.approx(0.5, abs=1e-4), "that is not its usage yet"
    script.replies = [json_reply(id="resp_1", status="completed", usage={"input_tokens": 0, "output_tokens": 8_000})]
    for _ in range(2):
        await script.client(upstream).get(OPENAI + "/responses/resp_1")
        assert spent(upstream) == pytest.approx(0.08)
    await script.client(upstream).get(OPENAI + "/responses/resp_2")
    assert spent(upstream) == pytest.approx(0.08), "it was not created here"
    assert left(upstream) == NOTHING


@virtual
async def test_a_stream_in_the_background_goes_on_when_its_reader_leaves() -> None:
    upstream = upstream_of()
    created = b'data: {"type":"response.created","response":{"id":"resp_1","usage":null}}\n\n'
    script = Script(httpx2, Reply.stream(created, *words("x"), pause=1.0))
    asked = {"model": "gpt-5", "input": "think", "background": True, "stream": True, "max_output_tokens": 50_000}
    async with script.client(upstream).stream("POST", OPENAI + "/responses", json=asked) as response:
        await anext(response.aiter_raw())
    assert spent(upstream) == pytest.approx(0.5, abs=1e-4)
    script.replies = [json_reply(id="resp_1", usage={"input_tokens": 0, "output_tokens": 8_000})]
    await script.client(upstream).get(OPENAI + "/responses/resp_1")
    assert spent(upstream) == pytest.approx(0.08)


@virtual
@pytest.mark.parametrize("readable", [True, False])
async def test_what_a_long_answer_tells_at_its_begin_is_paid(
    readable: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not readable:
        monkeypatch.setattr(usage_meter, "_MAX_BODY", 1 << 20)
    searches = [{"type": "web_search_call"}] * 30
    usage = {"input_tokens": 0, "output_tokens": 1_000}
    upstream = upstream_of()
    answer = json_reply(output=[*searches, {"type": "message", "text": "x" * 2_000_000}], usage=usage)
    asked = {"model": "gpt-4o", "input": "x", "max_output_tokens": 1_000, "tools": [{"type": "web_search"}]}
    await post(Script(httpx2, answer), upstream, "/responses", **asked)
    if readable:
        assert spent(upstream) == pytest.approx(0.01 + 30 * 0.01)
    else:
        assert spent(upstream) >= 0.01 + 0.05, "as much as was reserved"


@virtual
@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "refused"), httpx2.ConnectError("refused"), httpx2.ConnectTimeout("slow")]
)
async def test_what_was_not_sent_costs_nothing(error: Exception) -> None:
    upstream = upstream_of(retry=Retry(max_attempts=2))

    async def refuse(_: HttpRequest) -> HttpResponse:
        raise error

    body = json.dumps({"model": "gpt-4o", "messages": [], "max_tokens": 50_000}).encode()
    with pytest.raises(type(error)):
        await upstream.send(HttpRequest("POST", OPENAI + "/chat/completions", {}, body), refuse)
    assert spent(upstream) == 0.0
    async with upstream.call("gpt-4o", input_tokens=10, output_tokens=50_000) as call:
        call.overloaded()
    assert spent(upstream) == 0.0
    assert left(upstream) == NOTHING


# --- calls that are left ---


async def leave(upstream: Upstream, *pieces: bytes, after: float, **asked: Any) -> None:
    """Read a stream for some seconds, and leave it."""
    script = Script(httpx2, Reply.stream(*pieces, pause=1.0))
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x" * 40_000}], "stream": True, **asked}
    async with script.client(upstream).stream("POST", OPENAI + "/chat/completions", json=body) as response:
        try:
            async with asyncio.timeout(after):
                async for _ in response.aiter_raw():
                    pass
        except TimeoutError:
            pass


INPUT = 0.025  # dollars: 10,000 tokens


@virtual
async def test_a_stream_that_is_left_before_its_first_text_pays_for_its_time_and_not_its_whole_reservation() -> None:
    upstream = upstream_of()
    await leave(upstream, *words("late"), after=0.5, max_tokens=50_000)
    assert spent(upstream) == pytest.approx(INPUT + 100 * 10e-6, rel=0.02)


@virtual
async def test_hidden_output_of_a_stream_that_is_left_is_paid() -> None:
    upstream = upstream_of()
    thinking = [chunk(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": None}])] * 60
    await leave(upstream, *thinking, *words("ok"), STOP, after=61.5, max_tokens=50_000)
    assert spent(upstream) >= INPUT + 60 * 200 * 10e-6


@virtual
async def test_hidden_output_of_a_stream_that_is_closed_before_its_end_is_paid() -> None:
    upstream = upstream_of()
    thinking = [chunk(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": None}])] * 60
    await leave(upstream, *thinking, *words("ok"), after=100.0, max_tokens=50_000)
    assert spent(upstream) >= INPUT + 60 * 200 * 10e-6
    assert left(upstream) == NOTHING


@virtual
async def test_a_bound_that_the_provider_does_not_keep_to_bounds_nothing() -> None:
    upstream = upstream_of()
    await leave(upstream, *words(*["word " * 100] * 20), after=18.5, max_tokens=1)
    assert spent(upstream) >= INPUT + 18 * 100 * 10e-6


@virtual
async def test_hidden_output_between_two_words_of_a_stream_that_is_left_is_paid() -> None:
    upstream = upstream_of()
    thinking = [chunk(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": None}])] * 30
    await leave(upstream, *words("so"), *thinking, *words("well"), *thinking, after=58.5, max_tokens=50_000)
    assert spent(upstream) >= INPUT + 55 * 200 * 10e-6


@virtual
async def test_a_summary_of_reasoning_does_not_hide_the_reasoning_of_a_stream_that_is_left() -> None:
    upstream = upstream_of()
    summary = [chunk(choices=[{"index": 0, "delta": {"reasoning": "Hm"}, "finish_reason": None}])] * 60
    await leave(upstream, *summary, *words("so"), after=60.5, max_tokens=50_000)
    assert spent(upstream) >= INPUT + 59 * 200 * 10e-6


@virtual
@pytest.mark.parametrize(
    ("asked", "after", "least"),
    [
        ({"n": 100, "max_tokens": 4_000}, 2.0, 100 * 2 * 200 * 10e-6),
        ({}, 600.0, 600 * 200 * 10e-6),
        ({"max_tokens": 100, "web_search_options": {}}, 0.1, 0.009),
        ({"max_tokens": 100, "messages": [{"role": "user", "content": "x" * 40_000}]}, 0.1, INPUT),
    ],
)
async def test_a_key_that_was_never_accepted_pays_for_what_can_have_been_made(
    asked: dict[str, Any], after: float, least: float
) -> None:
    upstream = Upstream("openai", provider="openai", budget=Budget(usd=1_000.0))
    client = Script(httpx2, Reply(pause=1_000.0)).client(upstream)
    body = {"model": "gpt-4o", "messages": [], **asked}

    async def give_up() -> None:
        async with asyncio.timeout(after):
            await client.post(OPENAI + "/chat/completions", json=body, headers={"authorization": "Bearer sk-1"})

    with pytest.raises(TimeoutError):
        await give_up()
    assert spent(upstream) >= least * 0.99


@virtual
async def test_a_connection_that_fails_beside_a_paid_call_does_not_make_it_free() -> None:
    upstream = upstream_of()
    with pytest.raises(ConnectionRefusedError):
        async with upstream.call("gpt-4o", input_tokens=10, output_tokens=50_000):
            raise ConnectionRefusedError  # of a cache, after the model has answered
    assert spent(upstream) == pytest.approx(0.5, rel=0.01)


@virtual
async def test_keys_that_were_never_accepted_cannot_use_up_the_budget_by_hanging_up() -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply(pause=1.0))
    client = script.client(upstream)
    body = {"model": "gpt-4o", "messages": [], "max_tokens": 50_000}

    async def hang_up(key: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.post(OPENAI + "/chat/completions", json=body, headers={"authorization": key})

    for number in range(20):
        await hang_up(f"Bearer junk-{number}")
    assert spent(upstream) == pytest.approx(20 * 20 * 10e-6, rel=0.1)
    headers = {"authorization": "Bearer good"}
    assert (await client.post(OPENAI + "/chat/completions", json=body, headers=headers)).status_code == 200
    before = spent(upstream)
    await hang_up("Bearer good")
    assert spent(upstream) == pytest.approx(before + 0.5, rel=1e-3), "it may go on at the provider"


@virtual
async def test_hidden_output_is_bounded_by_the_call() -> None:
    upstream = upstream_of()
    await leave(upstream, *[chunk(choices=[])] * 600, after=500.0, max_tokens=1_000)
    assert spent(upstream) == pytest.approx(INPUT + 1_000 * 10e-6, rel=0.02)


@virtual
async def test_a_stream_that_is_left_after_the_clock_went_back_returns_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply.stream(*words("one", "two"), pause=1.0))
    body = {"model": "gpt-4o", "messages": [], "stream": True, "max_tokens": 100}
    async with script.client(upstream).stream("POST", OPENAI + "/chat/completions", json=body) as response:
        monkeypatch.setattr(clock, "now", lambda: -1_000.0)
        await anext(response.aiter_raw())
    assert left(upstream) == NOTHING
    assert spent(upstream) == pytest.approx(10e-6, rel=0.5)


@virtual
@pytest.mark.parametrize("provider", ["openai", "vllm", "openai-compatible"])
@pytest.mark.parametrize("pieces", [[STOP, DONE], [STOP], [DONE]], ids=["whole", "no end mark", "no finish reason"])
@pytest.mark.parametrize("after", [100.0, 4.5], ids=["read", "left at its end"])
async def test_a_whole_stream_without_usage_counts_as_reserved(
    provider: str, pieces: list[bytes], after: float
) -> None:
    upstream = Upstream("own", provider=provider, budget=DOLLAR, prices={"gpt-4o": Price(input=2.5, output=10.0)})
    await leave(upstream, *words("one", "two"), *pieces, *[b": still open\n\n"] * 5, after=after, max_tokens=10_000)
    assert spent(upstream) == pytest.approx(INPUT + 0.1, rel=0.02)


@virtual
@pytest.mark.parametrize("stream", [True, 1, 1.0, "true", "True", "yes"])
async def test_a_lenient_server_is_asked_for_the_usage_of_whatever_it_streams(stream: object) -> None:
    upstream = upstream_of()
    usage = chunk(choices=[], usage={"prompt_tokens": 10_000, "completion_tokens": 5_000})
    script = Script(httpx2, Reply.stream(*words("one"), STOP, usage, DONE))
    await post(script, upstream, "/chat/completions", model="gpt-4o", messages=[], stream=stream, max_tokens=10_000)
    assert json.loads(script.requests[0].content)["stream_options"] == {"include_usage": True}
    assert spent(upstream) == pytest.approx(INPUT + 0.05)


@virtual
async def test_a_call_without_a_bound_that_is_cancelled_pays_for_its_time() -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply(pause=300.0))
    calling = asyncio.create_task(post(script, upstream, "/chat/completions", model="gpt-4o", messages=[]))
    await asyncio.sleep(100.0)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert spent(upstream) == pytest.approx(100 * 200 * 10e-6, rel=0.02)


@virtual
async def test_small_calls_do_not_lower_what_a_large_one_reserves() -> None:
    upstream = upstream_of()
    script = Script(httpx2, json_reply(usage={"prompt_tokens": 1, "completion_tokens": 1}))
    for _ in range(20):
        await post(script, upstream, "/chat/completions", model="gpt-4o", messages=[], max_tokens=40_000)
    script.replies = [
        Reply(pause=60.0, body=[json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 40_000}}).encode()])
    ]
    calls = [
        post(script, upstream, "/chat/completions", model="gpt-4o", messages=[], max_tokens=40_000) for _ in range(50)
    ]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(answer, Exception) for answer in answers) == 2
    assert spent(upstream) <= 1.0


@virtual
async def test_after_large_answers_calls_without_a_bound_reserve_as_much() -> None:
    upstream = upstream_of()
    script = Script(httpx2, json_reply(pause=60.0, usage={"prompt_tokens": 1, "completion_tokens": 30_000}))
    await post(script, upstream, "/chat/completions", model="gpt-4o", messages=[])
    calls = [post(script, upstream, "/chat/completions", model="gpt-4o", messages=[]) for _ in range(50)]
    await asyncio.gather(*calls, return_exceptions=True)
    assert spent(upstream) <= 1.0


@virtual
async def test_a_body_that_is_read_while_it_is_sent_cannot_be_counted() -> None:
    async def pieces() -> Any:
        yield json.dumps(CHAT_REQUEST).encode()

    for how in ({"budget": DOLLAR}, {"quotas": [Quota(tokens=100_000, per="minute")]}):
        script = Script(httpx2)
        upstream = Upstream("openai", provider="openai", **how)
        with pytest.raises(Overloaded, match="not a JSON object"):
            await script.client(upstream).post(OPENAI + "/chat/completions", content=pieces())
        assert not script.requests


# --- what a request sends unseen ---


@virtual
async def test_calls_that_continue_a_stored_response_reserve_its_length() -> None:
    upstream = upstream_of()
    usage = {"input_tokens": 150_000, "output_tokens": 10_000}
    script = Script(httpx2, json_reply(pause=60.0, id="resp_1", usage=usage))
    await post(script, upstream, "/responses", model="gpt-4o", input="x", max_output_tokens=1)
    left_over = 1.0 - spent(upstream)
    asked = {"model": "gpt-4o", "input": "x", "max_output_tokens": 1, "previous_response_id": "resp_1"}
    answers = await asyncio.gather(
        *[post(script, upstream, "/responses", **asked) for _ in range(50)], return_exceptions=True
    )
    assert sum(not isinstance(answer, Exception) for answer in answers) == left_over // 0.4


@virtual
@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "previous_response_id": "elsewhere"},
        {"input": "x", "conversation": "conv_1"},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x"}]}]},
        {"input": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "https://x"}}]}]},
    ],
)
async def test_what_is_stored_elsewhere_is_reserved(body: dict[str, Any]) -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply(pause=60.0))
    calls = [post(script, upstream, "/responses", model="gpt-4o", max_output_tokens=1, **body) for _ in range(50)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(answer, Exception) for answer in answers) == 7  # 50,000 tokens cost 0.125 dollars


@virtual
async def test_a_stream_that_is_left_pays_for_what_was_sent_unseen() -> None:
    upstream = upstream_of()
    script = Script(httpx2, json_reply(id="resp_1", usage={"input_tokens": 10_000, "output_tokens": 10_000}))
    await post(script, upstream, "/responses", model="gpt-4o", input="x", max_output_tokens=1)
    before = spent(upstream)
    script.replies = [Reply.stream(chunk(type="response.created"), *words("x"), pause=1.0)]
    asked = {"model": "gpt-4o", "input": "x", "stream": True, "max_output_tokens": 1, "previous_response_id": "resp_1"}
    async with script.client(upstream).stream("POST", OPENAI + "/responses", json=asked) as response:
        await anext(response.aiter_raw())
    assert spent(upstream) - before == pytest.approx(0.05, rel=0.01)


@virtual
async def test_an_image_that_is_left_is_paid() -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply.stream(chunk(type="image_generation.partial_image"), *words("x"), pause=1.0))
    asked = {"model": "gpt-image-1", "prompt": "a dam", "stream": True}
    async with script.client(upstream).stream("POST", OPENAI + "/images/generations", json=asked) as response:
        await anext(response.aiter_raw())
    assert spent(upstream) == pytest.approx(0.4, rel=0.01)


@virtual
async def test_a_dearer_model_that_answers_is_paid() -> None:
    upstream = upstream_of()
    usage = {"prompt_tokens": 100_000, "completion_tokens": 0}
    for answered_by in ("gpt-4o", "gpt-4o-mini", "unheard-of", None):
        script = Script(httpx2, json_reply(usage=usage, model=answered_by))
        await post(script, upstream, "/chat/completions", model="gpt-4o-mini", messages=[], max_tokens=1)
    assert spent(upstream) == pytest.approx(0.25 + 3 * 0.015)


@virtual
async def test_the_deployment_in_the_path_is_paid_whatever_the_body_says() -> None:
    upstream = upstream_of()
    script = Script(httpx2, json_reply(usage={"prompt_tokens": 100_000, "completion_tokens": 0}))
    path = "/openai/deployments/gpt-4o/chat/completions"
    await post(script, upstream, path, model="gpt-4o-mini", messages=[], max_tokens=1)
    assert spent(upstream) == pytest.approx(0.25)


@virtual
async def test_the_largest_of_several_bounds_is_reserved() -> None:
    upstream = upstream_of()
    bounds = {"max_completion_tokens": 1, "max_tokens": 200_000}
    with pytest.raises(Overloaded, match="may cost 2"):
        await post(Script(httpx2), upstream, "/chat/completions", model="gpt-4o", messages=[], **bounds)


@virtual
@pytest.mark.parametrize(
    ("path", "bound"),
    [
        ("/chat/completions", "max_output_tokens"),
        ("/completions", "max_output_tokens"),
        ("/completions", "max_completion_tokens"),
        ("/responses", "max_tokens"),
        ("/messages", "max_completion_tokens"),
        ("/chat/completions", "no_such_bound"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 200_000])
async def test_a_bound_that_the_endpoint_does_not_know_bounds_nothing(path: str, bound: str, tokens: int) -> None:
    upstream = upstream_of()
    calling = asyncio.create_task(
        post(Script(httpx2, Reply(pause=9.0)), upstream, path, model="gpt-4o", **{bound: tokens})
    )
    await asyncio.sleep(0.1)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert spent(upstream) == pytest.approx(16_384 * 10e-6, rel=0.02)  # as of a call without a bound


@virtual
@pytest.mark.parametrize("bound", ["max_tokens", "max_completion_tokens"])
async def test_a_bound_of_nothing_bounds_nothing(bound: str) -> None:
    upstream = upstream_of()
    with pytest.raises(Overloaded, match="may cost"):
        await post(Script(httpx2), upstream, "/chat/completions", model="gpt-4o", messages=[], n=100, **{bound: 0})


@virtual
@pytest.mark.parametrize("prompt", [["hi"] * 50, [[1, 2]] * 50, [[]] * 50, ["hi", [1, 2]] * 25])
@pytest.mark.parametrize("n", [1, 2])
async def test_each_prompt_of_a_legacy_completion_is_reserved(prompt: list[Any], n: int) -> None:
    upstream = upstream_of()
    fields: dict[str, Any] = {"model": "gpt-4o", "prompt": prompt, "max_tokens": 900, "n": n}
    calling = asyncio.create_task(post(Script(httpx2, Reply(pause=9.0)), upstream, "/completions", **fields))
    await asyncio.sleep(0.1)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert spent(upstream) == pytest.approx(n * 50 * 900 * 10e-6, rel=0.02)


@virtual
async def test_the_tokens_of_one_prompt_are_one_prompt() -> None:
    upstream = upstream_of()
    usage = json_reply(usage={"prompt_tokens": 1, "completion_tokens": 1})
    await post(Script(httpx2, usage), upstream, "/completions", model="gpt-4o", prompt=[1] * 1_000, max_tokens=50_000)
    assert spent(upstream) < 0.001


@virtual
@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 1, "Max_Tokens": 50_000}, {"MAX_TOKENS": 1}, {"max_tokens": 1, "N": 100}, {"max_to\u212aens": 1}],
)
async def test_a_key_in_another_case_cannot_be_read(fields: dict[str, int]) -> None:
    with pytest.raises(Overloaded, match="in another case"):
        await post(Script(httpx2), upstream_of(), "/chat/completions", model="gpt-4o", messages=[], **fields)


@virtual
async def test_a_key_of_its_own_may_be_in_any_case() -> None:
    usage = json_reply(usage={"prompt_tokens": 1, "completion_tokens": 1})
    fields = {"topK": 1, "max_tokens": 1}
    await post(Script(httpx2, usage), upstream_of(), "/chat/completions", model="gpt-4o", messages=[], **fields)


@virtual
async def test_of_several_models_the_one_that_answers_is_paid_and_without_its_name_the_dearest() -> None:
    usage = {"prompt_tokens": 100_000, "completion_tokens": 0}
    fields: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [], "max_tokens": 1, "models": ["gpt-4o"]}
    upstream = upstream_of()
    for answered_by, usd in (("gpt-4o", 0.25), ("gpt-4o-mini", 0.015), (None, 0.25), ("unheard-of", 0.25)):
        before = spent(upstream)
        script = Script(httpx2, json_reply(usage=usage, model=answered_by))
        await post(script, upstream, "/chat/completions", **fields)
        assert spent(upstream) - before == pytest.approx(usd)


@virtual
async def test_of_several_models_the_dearest_is_reserved() -> None:
    fields: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [], "max_tokens": 50_000}
    upstream = upstream_of()
    calling = asyncio.create_task(
        post(Script(httpx2, Reply(pause=9.0)), upstream, "/chat/completions", **fields, models=["gpt-4o"])
    )
    await asyncio.sleep(0.1)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert spent(upstream) == pytest.approx(0.5, rel=0.01)
    with pytest.raises(Overloaded, match="no price is known for model 'unheard-of'"):
        await post(Script(httpx2), upstream, "/chat/completions", **fields, models=["gpt-4o", "unheard-of"])


@virtual
async def test_plugins_of_a_provider_have_no_price() -> None:
    with pytest.raises(Overloaded, match="plugins"):
        await post(
            Script(httpx2), upstream_of(), "/chat/completions", model="gpt-4o", messages=[], plugins=[{"id": "web"}]
        )


@virtual
async def test_a_burst_of_calls_without_a_bound_reserves_what_they_can_make() -> None:
    upstream = upstream_of()
    script = Script(httpx2, json_reply(usage={"prompt_tokens": 1, "completion_tokens": 1}))
    for _ in range(20):
        await post(script, upstream, "/chat/completions", model="gpt-4o", messages=[])
    script.replies = [json_reply(pause=60.0, usage={"prompt_tokens": 1, "completion_tokens": 16_384})]
    calls = [post(script, upstream, "/chat/completions", model="gpt-4o", messages=[]) for _ in range(50)]
    await asyncio.gather(*calls, return_exceptions=True)
    assert spent(upstream) <= 1.0


@virtual
async def test_a_call_that_falls_back_is_counted_where_it_is_served() -> None:
    free = Upstream("local", provider="vllm")
    paid = upstream_of(fallback=Fallback(free, base_url="https://local.test/v1", api_key="k"))
    script = Script(httpx2)
    answer = await post(script, paid, "/chat/completions", model="mine", messages=[], max_tokens=1)
    assert answer.status_code == 200
    assert [request.url.host for request in script.requests] == ["local.test"]


@virtual
async def test_the_pauses_of_a_slow_reader_are_no_silence_of_the_model() -> None:
    upstream = upstream_of()
    script = Script(httpx2, Reply.stream(*words(*["word"] * 40)))
    body = {"model": "gpt-4o", "messages": [], "stream": True}
    async with script.client(upstream).stream("POST", OPENAI + "/chat/completions", json=body) as response:
        pieces = response.aiter_raw()
        for _ in range(3):
            await anext(pieces)
            await asyncio.sleep(20.0)
    assert spent(upstream) < 0.001
