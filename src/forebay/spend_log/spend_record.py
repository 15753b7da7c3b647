"""The rows of a spend log."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

HOUR: Final = 3600  # seconds
OTHER: Final = "(other)"
"""The model, key or tenant of what is beyond the number that is told apart."""
ALL_UPSTREAMS: Final = ""
"""The upstream of a budget that holds over all upstreams of a file."""


class SpendLabels(NamedTuple):
    """The labels by which spend is added up.

    Attributes:
        hour: when the hour of the call began, in epoch seconds; of spend that is long past, the day.
        upstream: names the upstream.
        tenant: that the call was for.
        model: that it was made to.
        key: the name of the key that a gateway has issued, with which it was made; empty without one.
        api_key: the provider's API key that it was sent with, as in the name of its account, which is a digest or a
            name; empty without one.
    """

    hour: int
    upstream: str
    tenant: str
    model: str
    key: str = ""
    api_key: str = ""


class SpendAmounts(msgspec.Struct):
    """The amounts that are added up for some labels.

    Attributes:
        calls: that were answered, or that cost something though they failed.
        input_tokens: that they sent, cached ones included.
        output_tokens: that they received.
        usd: dollars that they cost.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def add(self, other: SpendAmounts) -> None:
        """Add others."""
        self.calls += other.calls
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.usd += other.usd


class TaskHour(NamedTuple):
    """The labels by which the spend of single tasks is added up, where tasks have budgets."""

    hour: int
    upstream: str
    task_id: str


class AlertPlace(NamedTuple):
    """The budget that an alert, or what is spent, is about.

    Attributes:
        upstream: names the upstream; `ALL_UPSTREAMS` for the budget of a tenant or of an issued key over all of them.
        budget: ``"budget"``, ``"tenant_budget"``, ``"task_budget"`` or ``"key_budget"``.
        subject: the tenant, the task or the name of the key; empty for the budget of all calls.
    """

    upstream: str
    budget: str
    subject: str


class GivenAlert(NamedTuple):
    """The highest share of a budget that an alert was given for, and the period that it was in, in epoch seconds."""

    period: float
    share: float


def hour_of(time: float) -> int:
    """Return when the hour of an epoch time began."""
    return math.floor(time / HOUR) * HOUR
