"""The task store on SQS: what its index and its queues make of each other, over hours and days."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from tests.support.leases import after_failure
from tests.support.simulated_queues import SimulatedQueues

pytest.importorskip("botocore")

from botocore.exceptions import ClientError, NoCredentialsError

from forebay import clock
from forebay.errors import MessageTooLarge, StoreUnavailable
from forebay.interfaces import Completion, PutResult, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore
from forebay.overflow.sqs import SqsTaskStore
from forebay.overflow.sqs_queues import Message, SqsQueues, encode_message
from forebay.storage.url import SqsUrl
from forebay.task import Priority

DONE = Completion(status="succeeded", finished_at=1e9)
DAY = 86400.0


class LastingIndex(MemoryTaskStore):
    """An index that several stores share."""

    durable = True


def record(task_id: str = "a", **fields: Any) -> TaskRecord:
    given = {"envelope": b"envelope", "enqueued_at": 1.0, **fields}
    return TaskRecord(task_id=task_id, task_type="t", priority=Priority.NORMAL, **given)


@pytest.fixture
def queues() -> SimulatedQueues:
    return SimulatedQueues()


async def opened(queues: SimulatedQueues, index: MemoryTaskStore | None = None) -> Any:
    store = SqsTaskStore(queues, LastingIndex() if index is None else index)  # type: ignore[arg-type]
    await store.open()
    return store


async def test_messages_without_a_record_are_taken_in_since_the_index_was_lost(queues: SimulatedQueues) -> None:
    before = await opened(queues)
    await before.put(record(key="k"))
    await before.put(record("b"))
    await before.lease("t", 1, until=clock.wall_time() + 30.0)
    await before.close()

    queues.now += 60.0
    after = await opened(queues)
    await after.reap(now=clock.wall_time(), max_attempts=3)
    leases = await after.lease("t", 9, until=clock.wall_time() + 30.0)
    assert sorted(lease.record.task_id for lease in leases) == ["a", "b"]
    assert {lease.record.envelope for lease in leases} == {b"envelope"}
    assert await after.find_key("k") == "a"


async def test_a_long_backlog_is_taken_in_within_a_few_heartbeats(queues: SimulatedQueues) -> None:
    before = await opened(queues)
    for number in range(2_500):
        await before.put(record(f"{number}"))
    after = await opened(queues)
    for _ in range(3):
        await after.reap(now=clock.wall_time(), max_attempts=3)
    assert await after.depths() == {("t", Priority.NORMAL, "default"): 2_500}


async def test_without_a_shared_index_the_next_process_finds_what_the_one_before_has_left(
    queues: SimulatedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.overflow.sqs._DISCOVERY_INTERVAL", 0.0)
    before = await opened(queues, MemoryTaskStore())
    for number in range(50):
        await before.put(record(f"{number}", tenant="acme"))
    await before.lease("t", 5, until=clock.wall_time() + 30.0)  # which it does not live to end
    queues.now += 60.0
    after = await opened(queues, MemoryTaskStore())
    assert await after.depths() == {("t", Priority.NORMAL, "acme"): 50}
    leases = await after.lease("t", 30, until=clock.wall_time() + 30.0)
    leases += await after.lease("t", 99, until=clock.wall_time() + 30.0)
    assert len({lease.record.task_id for lease in leases}) == 50
    assert await after.depths() == {}


async def test_an_old_message_without_a_record_becomes_a_dead_letter_since_its_task_may_have_ended(
    queues: SimulatedQueues, caplog: pytest.LogCaptureFixture
) -> None:
    before = await opened(queues)
    await before.put(record())
    queues.messages[0].sent_at -= 2 * DAY
    after = await opened(queues)
    await after.reap(now=clock.wall_time(), max_attempts=3)
    assert await after.lease("t", 9, until=clock.wall_time() + 30.0) == []
    (dead,) = await after.list_records(RecordState.DEAD, 9)
    assert "its record is missing" in str(dead.completion.error)
    assert "its record is missing" in caplog.text
    assert await after.requeue("a") is PutResult.STORED
    (lease,) = await after.lease("t", 9, until=clock.wall_time() + 30.0)
    assert lease.record.envelope == b"envelope"


async def test_a_record_without_a_message_becomes_a_dead_letter_since_the_queue_was_purged(
    queues: SimulatedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.overflow.sqs._CLEANUP_INTERVAL", 0.0)
    store = await opened(queues)
    await store.put(record("old", thread_id="t"))
    await store.put(record("new", enqueued_at=clock.wall_time()))
    await store.put(record("next", thread_id="t", enqueued_at=2.0))
    queues.messages.clear()
    await store.reap(now=clock.wall_time(), max_attempts=3)
    assert await store.list_records(RecordState.DEAD, 9) == []  # the service may count late
    await store.reap(now=clock.wall_time(), max_attempts=3)
    (dead,) = await store.list_records(RecordState.DEAD, 9)
    assert dead.record.task_id == "old"
    assert "purged" in str(dead.completion.error)
    with pytest.raises(StoreUnavailable, match="message of that dead letter"):
        await store.requeue("old")
    assert await store.depths() == {("t", Priority.NORMAL, "default"): 2}


async def test_a_task_that_runs_for_days_is_seen_every_12_hours_and_stays_leased(queues: SimulatedQueues) -> None:
    index = LastingIndex()
    store, other = await opened(queues, index), await opened(queues, index)
    await store.put(record())
    (lease,) = await store.lease("t", 1, until=clock.wall_time() + 30.0)
    for _ in range(3 * 24 * 6):
        queues.now += 600.0
        assert store.renew([lease], until=clock.wall_time() + 630.0) == []
        assert queues.messages[0].visible_at - queues.now <= 12 * 3600.0
        await other.reap(now=clock.wall_time(), max_attempts=3)
        assert await other.lease("t", 1, until=clock.wall_time() + 30.0) == []
    assert queues.messages[0].receives >= 1
    assert await store.finish("a", DONE, fence=lease.fence)
    queues.now += DAY
    monkey = await opened(queues, index)
    await monkey.reap(now=clock.wall_time(), max_attempts=3)
    for each in (store, other, monkey):
        await each.close()
    assert queues.messages == []


async def test_a_delay_of_days_ends_when_it_is_due(queues: SimulatedQueues) -> None:
    store = await opened(queues)
    await store.put(record())
    (lease,) = await store.lease("t", 1, until=clock.wall_time() + 30.0)
    assert await store.delay(after_failure(lease, wait=2 * DAY), due=clock.wall_time() + 2 * DAY)
    hidden = queues.messages[0].visible_at
    assert 12 * 3600.0 - 10 <= hidden <= 12 * 3600.0  # as long as a message can be hidden
    queues.now = hidden
    await store.put(record("b"))
    (lease,) = await store.lease("t", 9, until=clock.wall_time() + 30.0)
    assert lease.record.task_id == "b"
    queues.now += 3 * DAY
    assert (await store.wake(now=clock.wall_time() + 2 * DAY)).woken == 1
    (lease,) = await store.lease("t", 9, until=clock.wall_time() + 30.0)
    assert (lease.record.task_id, lease.record.failures) == ("a", 1)


async def test_the_message_of_a_task_that_was_cancelled_while_it_waited_is_deleted(
    queues: SimulatedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.overflow.sqs._CLEANUP_INTERVAL", 0.0)
    store = await opened(queues)
    await store.put(record())
    assert await store.finish("a", Completion(status="cancelled", finished_at=5.0), fence=None)
    await store.reap(now=clock.wall_time(), max_attempts=3)
    await store.close()
    assert queues.messages == []


async def test_a_message_that_was_delivered_twice_runs_once(queues: SimulatedQueues) -> None:
    store = await opened(queues)
    await store.put(record())
    queues.messages.append(type(queues.messages[0])(queues.messages[0].outgoing, clock.wall_time(), 0.0))
    (lease,) = await store.lease("t", 9, until=clock.wall_time() + 30.0)
    assert await store.lease("t", 9, until=clock.wall_time() + 30.0) == []
    assert await store.finish("a", DONE, fence=lease.fence)
    queues.now += 60.0
    await store.put(record("b"))
    leases = await store.lease("t", 9, until=clock.wall_time() + 30.0)
    assert [lease.record.task_id for lease in leases] == ["b"]


async def test_a_task_whose_process_died_comes_back_as_soon_as_its_lease_has_lapsed(queues: SimulatedQueues) -> None:
    index = LastingIndex()
    store, other = await opened(queues, index), await opened(queues, index)
    await store.put(record())
    now = clock.wall_time()
    assert len(await store.lease("t", 1, until=now + 5.0)) == 1
    queues.now += 6.0
    await other.put(record("b"))
    assert [lease.record.task_id for lease in await other.lease("t", 9, until=now + 60.0)] == ["b"]
    assert queues.messages[0].visible_at > queues.now + 10.0  # it was seen, found leased, and hidden
    await other.reap(now=now + 6.0, max_attempts=3)
    assert [lease.record.task_id for lease in await other.lease("t", 9, until=now + 60.0)] == ["a"]


async def test_a_conversation_goes_on_at_once_where_its_next_message_was_seen(queues: SimulatedQueues) -> None:
    store = await opened(queues)
    until = clock.wall_time() + 60.0
    for name in ("a", "b", "c"):
        await store.put(record(name, thread_id="t"))
    await store.put(record("other"))
    leases = await store.lease("t", 9, until=until)
    assert sorted(lease.record.task_id for lease in leases) == ["a", "other"]
    for name in ("b", "c"):
        (ended,) = [lease for lease in leases if lease.record.thread_id]
        assert await store.finish(ended.record.task_id, DONE, fence=ended.fence)
        leases = await store.lease("t", 9, until=until)
        assert [lease.record.task_id for lease in leases] == [name]


async def test_a_retry_starts_at_once_where_its_attempt_has_failed(queues: SimulatedQueues) -> None:
    store = await opened(queues)
    until = clock.wall_time() + 60.0
    await store.put(record())
    (lease,) = await store.lease("t", 9, until=until)
    await store.delay(after_failure(lease, wait=5.0), due=clock.wall_time() + 5.0)
    await store.wake(now=clock.wall_time() + 5.0)
    assert [lease.record.task_id for lease in await store.lease("t", 9, until=until)] == ["a"]


async def test_a_task_that_kills_its_process_is_dead_at_last_even_without_a_shared_index(
    queues: SimulatedQueues,
) -> None:
    await (await opened(queues, MemoryTaskStore())).put(record())
    for _ in range(40):  # processes, each of which dies
        queues.now += 60.0
        store = await opened(queues, MemoryTaskStore())
        await store.depths()
        leases = await store.lease("t", 1, until=10.0)
        for lease in leases:
            await store.begin_attempt(lease)
        dead = await store.reap(now=11.0, max_attempts=3)
        if dead:
            break
    assert [each.record.task_id for each in dead] == ["a"]


def test_a_store_whose_event_loop_has_ended_opens_again_on_the_next_one(queues: SimulatedQueues) -> None:
    store = SqsTaskStore(queues, LastingIndex())  # type: ignore[arg-type]

    async def use(name: str) -> list[str]:
        await store.open()
        await store.put(record(name))
        queues.now += 60.0
        leases = await store.lease("t", 9, until=clock.wall_time() + 30.0)
        await store.release(leases)
        return sorted(lease.record.task_id for lease in leases)

    assert asyncio.run(use("a")) == ["a"]
    assert asyncio.run(use("b")) == ["a", "b"]


async def test_a_task_that_is_too_large_for_a_message_is_rejected_with_what_to_do(queues: SimulatedQueues) -> None:
    store = await opened(queues)
    with pytest.raises(MessageTooLarge, match="in an object store for example") as caught:
        await store.put(record(envelope=b"x" * (1 << 20)))
    assert caught.value.bound == 1 << 20
    assert queues.messages == []
    assert await store.find("a") is None


async def test_a_store_that_fails_to_send_rejects_and_keeps_no_record(
    queues: SimulatedQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = StoreUnavailable(where="sqs", why="it is away", advice="Wait.")

    async def send(messages: Any) -> Any:
        return [failure for _ in messages]

    store = await opened(queues)
    with monkeypatch.context() as away:
        away.setattr(queues, "send", send)
        with pytest.raises(StoreUnavailable, match="it is away"):
            await store.put(record(key="k"))
    assert await store.find_key("k") is None
    assert await store.depths() == {}
    assert await store.put(record(key="k")) is PutResult.STORED
    assert (await store.find("a"))[0] is RecordState.WAITING


# --- the queues -------------------------------------------------------------------------------------------------------


class Client:
    """A client of the service that answers what a test wants, and raises it if it is an error."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, operation: str) -> Any:
        def call(**parameters: Any) -> Any:
            self.calls.append((operation, parameters))
            answer = self._answers.get(operation, {})
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def close(self) -> None:
        pass


def client_error(code: str) -> ClientError:
    text = "the key AKIAHIDDEN is not allowed"
    return ClientError({"Error": {"Code": code, "Message": text}}, "SendMessage")


async def connected(monkeypatch: pytest.MonkeyPatch, client: Client, **url: Any) -> SqsQueues:
    queues = SqsQueues(SqsUrl(queue="q", **url))
    monkeypatch.setattr(queues, "_connect", lambda: client)
    await queues.open()
    return queues


FOUND = {"get_queue_url": {"QueueUrl": "url"}, "get_queue_attributes": {"Attributes": {}}}


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (client_error("AccessDenied"), "AccessDenied"),
        (client_error("AWS.SimpleQueueService.NonExistentQueue"), "NonExistentQueue"),
        (NoCredentialsError(), "there are no credentials"),
        (OSError("HIDDEN"), "it does not answer"),
    ],
)
async def test_an_error_says_what_to_do_and_shows_no_credential(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "forebay")
    with pytest.raises(StoreUnavailable, match=why) as caught:
        await connected(monkeypatch, Client(get_queue_url=error), create=False)
    assert "HIDDEN" not in f"{caught.value}{caught.value.__cause__}{caplog.text}"


async def test_a_queue_that_is_missing_is_made_to_keep_messages_as_long_as_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = client_error("AWS.SimpleQueueService.NonExistentQueue")
    client = Client(get_queue_url=missing, create_queue={"QueueUrl": "url"}, get_queue_attributes={"Attributes": {}})
    await connected(monkeypatch, client, fifo=True)
    made = [parameters for operation, parameters in client.calls if operation == "create_queue"]
    assert [each["QueueName"] for each in made] == ["q-critical.fifo", "q-high.fifo", "q-normal.fifo", "q-low.fifo"]
    assert {each["Attributes"]["MessageRetentionPeriod"] for each in made} == {"1209600"}


async def test_a_queue_that_moves_messages_away_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = {"Attributes": {"RedrivePolicy": '{"maxReceiveCount": 5}'}}
    with pytest.raises(StoreUnavailable, match=r"received 5 times.*Remove its redrive policy"):
        await connected(monkeypatch, Client(**{**FOUND, "get_queue_attributes": policy}))


async def test_a_request_has_ten_messages_and_as_many_bytes_as_one_message_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = Client(**FOUND)
    queues = await connected(monkeypatch, client)
    small = [encode_message(record(f"{number}"), b"n") for number in range(12)]
    large = [encode_message(record(f"large {number}", envelope=b"x" * 100_000), b"n") for number in range(3)]
    assert await queues.send([*small, *large]) == [None] * 15
    sent = [parameters["Entries"] for operation, parameters in client.calls if operation == "send_message_batch"]
    assert sum(len(entries) for entries in sent) == 15
    assert max(len(entries) for entries in sent) == 10
    assert max(sum(len(entry["MessageBody"]) for entry in entries) for entries in sent) <= 256 << 10


async def test_messages_that_the_service_rejects_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"send_message_batch": {"Failed": [{"Id": "1", "Code": "InternalError"}]}}
    queues = await connected(monkeypatch, Client(**FOUND, **failed))
    first, second = await queues.send([encode_message(record(name), b"n") for name in ("a", "b")])
    assert first is None
    assert "InternalError" in str(second)


async def test_a_message_is_hidden_no_longer_than_the_service_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(**FOUND)
    queues = await connected(monkeypatch, client)
    old = Message(
        record=record(), nonce=b"n", handle="h", received_at=clock.now() - 11 * 3600.0, sent_at=0.0, receives=1
    )
    await queues.hide([(old, 2 * 3600.0)])
    queues.hide_blocking([(old, 2 * 3600.0)])
    for operation, parameters in client.calls[-2:]:
        assert operation == "change_message_visibility_batch"
        assert 3500 <= parameters["Entries"][0]["VisibilityTimeout"] <= 3600


async def test_a_message_that_cannot_be_read_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strange = {"receive_message": {"Messages": [{"Body": "{}", "ReceiptHandle": "h"}]}}
    client = Client(**FOUND, **strange)
    queues = await connected(monkeypatch, client)
    assert await queues.receive(Priority.NORMAL, 5, hidden=30.0) == []
    assert "cannot be read" in caplog.text
    assert client.calls[-1][0] == "change_message_visibility_batch"
