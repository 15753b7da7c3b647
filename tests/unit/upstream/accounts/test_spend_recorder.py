"""The records of calls in a spend log: each is in the hour of its permit, also when its cost is corrected later."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay import clock
from forebay.spend_log import SpendLog, SpendQuery, read_spend
from forebay.spend_log.spend_record import HOUR
from forebay.upstream.accounts.spend_recorder import SpendRecorder
from forebay.upstream.call_request import CallRequest

NINE = 1_764_000_000 // HOUR * HOUR


@pytest.fixture
def spend_log(tmp_path: Path) -> SpendLog:
    spend_log = SpendLog(f"sqlite:///{tmp_path / 'spend.db'}")
    spend_log.open()
    return spend_log


def rows(spend_log: SpendLog, *by: str) -> dict[tuple[object, ...], tuple[int, int, int, float]]:
    spend_log.close()
    found = read_spend(spend_log.path, SpendQuery(by=by))
    return {
        group.values: (group.amounts.calls, group.amounts.input_tokens, group.amounts.output_tokens, group.amounts.usd)
        for group in found
    }


def test_a_call_is_recorded_in_the_hour_of_its_permit(spend_log: SpendLog, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = SpendRecorder(spend_log, "openai", "ab12cd34", by_task=False)
    monkeypatch.setattr(clock, "wall_time", lambda: NINE + 3_599.0)
    call = recorder.begin(CallRequest(tenant="acme", model="gpt-4o"))
    assert call is not None
    monkeypatch.setattr(clock, "wall_time", lambda: NINE + 3_601.0)
    call.settle(2.0, input_tokens=100, output_tokens=50)
    call.revise(0.5, input_tokens=90, output_tokens=10)
    call.revise(0.75, input_tokens=90, output_tokens=20)
    assert rows(spend_log, "hour", "tenant", "model", "api_key") == {
        (NINE, "acme", "gpt-4o", "ab12cd34"): (1, 90, 20, 0.75)
    }


def test_a_call_is_recorded_by_the_name_of_its_issued_key_and_by_its_api_key(spend_log: SpendLog) -> None:
    recorder = SpendRecorder(spend_log, "openai", "ab12cd34", by_task=False)
    for key_name in ("writer", ""):
        call = recorder.begin(CallRequest(key_name=key_name))
        assert call is not None
        call.settle(1.0, input_tokens=0, output_tokens=0)
    assert sorted(rows(spend_log, "key", "api_key")) == [("", "ab12cd34"), ("writer", "ab12cd34")]


def test_a_call_whose_cost_is_known_only_later_is_one_call(spend_log: SpendLog) -> None:
    call = SpendRecorder(spend_log, "openai", "", by_task=False).begin(CallRequest(model="gpt-5"))
    assert call is not None
    call.revise(0.5, input_tokens=9, output_tokens=1)
    assert rows(spend_log) == {(): (1, 9, 1, 0.5)}


def test_a_request_that_is_free_is_not_recorded(spend_log: SpendLog) -> None:
    assert SpendRecorder(spend_log, "openai", "", by_task=False).begin(CallRequest(free=True)) is None


def test_the_name_of_a_model_is_cut(spend_log: SpendLog) -> None:
    call = SpendRecorder(spend_log, "openai", "", by_task=False).begin(CallRequest(model="m" * 100_000))
    assert call is not None
    call.settle(1.0, input_tokens=0, output_tokens=0)
    assert rows(spend_log, "model") == {("m" * 200,): (1, 0, 0, 1.0)}
