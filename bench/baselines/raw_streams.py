"""The baseline of the task store on Redis: a stream with a consumer group, whose commands are sent in batches.

It keeps less than a task store: no order by priority, deadline or tenant, no keys, results, delays or dead letters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis

from forebay.interfaces import TaskRecord


def stream_seconds(url: str, records: Sequence[TaskRecord], *, batch: int) -> tuple[float, float, float]:
    """Return the seconds to add `records` to a stream, to read them in a group, and to acknowledge and delete them."""
    with redis.Redis.from_url(url) as client:
        client.delete("stream")
        client.xgroup_create("stream", "workers", mkstream=True)
        started = time.perf_counter()
        for first in range(0, len(records), batch):
            pipeline = client.pipeline(transaction=False)
            for record in records[first : first + batch]:
                pipeline.xadd("stream", {"id": record.task_id, "envelope": record.envelope})
            pipeline.execute()
        added = time.perf_counter()
        ids = []
        while found := client.xreadgroup("workers", "worker", {"stream": ">"}, count=batch):
            ids += [each for each, _ in found[0][1]]
        read = time.perf_counter()
        assert len(ids) == len(records)
        for first in range(0, len(ids), batch):
            pipeline = client.pipeline(transaction=False)
            for each in ids[first : first + batch]:
                pipeline.xack("stream", "workers", each)
                pipeline.xdel("stream", each)
            pipeline.execute()
        acknowledged = time.perf_counter()
    return added - started, read - added, acknowledged - read
