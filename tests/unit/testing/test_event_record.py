"""A record has all events of a supervisor, and the tasks and results that they name."""

from __future__ import annotations

from tests.support.supervisor_checks import check_counts

from forebay import BackpressureSupervisor, Task, TaskStatus
from forebay.testing import EventRecord, SlowHandler, virtual


@virtual
async def test_a_record_has_all_events_until_it_is_stopped() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
        with EventRecord(supervisor) as record:
            first = Task("work", "rivers", task_id="a")
            await supervisor.run(first)
        await supervisor.run(Task("work", task_id="b"))
    assert [event.kind for event in record.events] == ["submitted", "started", "finished"]
    assert record.for_task("a") == record.events
    assert record.started == ["a"]
    assert record.tasks == {"a": first}
    assert record.statuses == {"a": TaskStatus.SUCCEEDED}
    assert record.results["a"].result == "rivers"
    late = EventRecord(supervisor)
    check_counts(late)
    assert (record.baseline.submitted, late.baseline.submitted) == (0, 2)
