"""The queues of a task store: one for each task type and tenant, so that a tenant's records wait for its turn alone."""

from __future__ import annotations

from typing import Final

DEFAULT_TENANT: Final = "default"

_MARK: Final = "\x1f"  # begins the name of a queue that is not just a task type


def queue_name(task_type: str, tenant: str) -> str:
    """Return the name of a queue: the task type, or, for another tenant than the default one, both."""
    if tenant == DEFAULT_TENANT and not task_type.startswith(_MARK):
        return task_type
    return f"{_MARK}{len(task_type)}:{task_type}{tenant}"


def split_queue_name(name: str) -> tuple[str, str]:
    """Return the task type and the tenant of a queue. A name that `queue_name` does not make is a task type."""
    length, colon, both = name.removeprefix(_MARK).partition(":")
    if not (name.startswith(_MARK) and colon and length.isdecimal() and len(both) > int(length)):
        return name, DEFAULT_TENANT
    return both[: int(length)], both[int(length) :]
