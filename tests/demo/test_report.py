"""The figures of the report, computed from the samples of the sides."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from demo.report import Report, SideRun, percent, quantile, report, side_report
from demo.sample import Sample, Side
from demo.settings import Settings
from demo.side_process import Ending
from demo.stored_tasks import StoredTasks

SETTINGS = Settings(tasks=1000, seconds=60.0, memory_mb=256)


BILL: dict[str, Any] = {
    "input_tokens": 3000,
    "output_tokens": 500,
    "usd": 4.0,
    "wasted_input_tokens": 60,
    "wasted_output_tokens": 10,
    "by_reason": {"stray": 3, "requests": 4},
}


STRAY = BILL | {"by_reason": {"stray": 7}}


def last_sample(**counts: Any) -> Sample:
    return Sample(t=60.0, stage="ended", **counts)


def played(last: Sample, **rest: Any) -> SideRun:
    known: dict[str, Any] = {
        "samples": (last,),
        "latencies": (),
        "memory": (),
        "peak_rss_mb": 100.0,
        "ending": Ending.TIME_UP,
        "ended_at": 60.0,
    }
    return SideRun(**known | rest)


def classic(**rest: Any) -> SideRun:
    counts = {"done": 20, "failed": 30, "usd": 10.0, "input_tokens": 900, "output_tokens": 100, "useful_tokens": 250}
    counts["useful_usd"] = 0.5
    return played(last_sample(**counts, calls=5000, calls_429=4000, answered=900), **rest)


def forebay(**rest: Any) -> SideRun:
    counts: dict[str, Any] = {"done": 200, "usd": 2.1, "useful_usd": 2.0, "input_tokens": 2000, "useful_tokens": 1900}
    counts |= {"calls_429": 7, "load": 0.5, "limited_by": "upstream:key", "waiting_for": "requests per minute"}
    return played(
        last_sample(**counts, calls=700, answered=650),
        **{"stored": StoredTasks(waiting=790, leased=10, done=200)} | rest,
    )


def semaphore(**rest: Any) -> SideRun:
    counts = {"done": 160, "failed": 4, "usd": 2.24, "input_tokens": 1500, "useful_tokens": 1200, "useful_usd": 1.6}
    return played(last_sample(**counts, calls=1000, calls_429=600, answered=380), **rest)


def compared(first: SideRun, last: SideRun, second: SideRun | None = None) -> Report:
    runs = {Side.CLASSIC: first, Side.SEMAPHORE: second or semaphore(), Side.FOREBAY: last}
    return report(runs, SETTINGS, "simulated")


def test_a_quantile_is_a_value_that_was_seen() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert quantile(values, 0.5) == 3.0
    assert quantile(values, 0.99) == 5.0
    assert quantile(values, 0.0) == 1.0
    assert quantile([7.0], 0.5) == 7.0
    assert quantile([], 0.5) is None


def test_tasks_in_memory_are_lost_with_the_process() -> None:
    figures = side_report(classic(), SETTINGS)
    assert (figures.done, figures.failed, figures.spilled, figures.lost) == (20, 30, 0, 950)
    figures = side_report(semaphore(), SETTINGS)
    assert (figures.done, figures.failed, figures.spilled, figures.lost) == (160, 4, 0, 836)


def test_tasks_on_disk_are_not_lost() -> None:
    figures = side_report(forebay(), SETTINGS)
    assert (figures.done, figures.spilled, figures.lost) == (200, 800, 0)


def test_a_task_missing_from_the_store_is_lost() -> None:
    assert side_report(forebay(stored=StoredTasks(waiting=790, done=200)), SETTINGS).lost == 10


def test_the_rate_of_a_process_that_died_early_is_over_the_whole_time() -> None:
    figures = side_report(classic(ending=Ending.OUT_OF_MEMORY, ended_at=15.0), SETTINGS)
    assert figures.done_per_minute == 20.0
    assert figures.out_of_memory


def test_the_rate_of_a_side_that_did_all_is_over_the_time_it_took() -> None:
    figures = side_report(forebay(stored=StoredTasks(done=1000), ended_at=30.0), SETTINGS)
    assert figures.done_per_minute == 2000.0


def test_tokens_that_belong_to_no_task_done_are_wasted() -> None:
    assert side_report(classic(), SETTINGS).tokens_wasted == 750
    assert side_report(forebay(), SETTINGS).tokens_wasted == 100


def test_the_providers_bill_takes_precedence_over_the_sides_own_count() -> None:
    figures = side_report(forebay(bill=BILL), SETTINGS)
    assert (figures.tokens, figures.tokens_wasted, figures.usd, figures.usd_per_done) == (3500, 1600, 4.0, 0.02)


def test_shares_are_of_calls_sent_and_of_tokens_billed() -> None:
    figures = side_report(forebay(bill=BILL), SETTINGS)
    assert figures.refused_share == 0.01
    assert figures.wasted_share == pytest.approx(1600 / 3500, abs=1e-5)
    idle = side_report(played(last_sample()), SETTINGS)
    assert idle.refused_share == idle.wasted_share == 0.0


def test_only_the_simulated_provider_counts_stray_429s_and_answers_that_nobody_received() -> None:
    figures = side_report(forebay(bill=BILL), SETTINGS)
    assert (figures.tokens_left, figures.stray_429) == (70, 3)
    figures = side_report(forebay(), SETTINGS)
    assert (figures.tokens_left, figures.stray_429) == (None, None)


def test_the_least_cost_is_that_of_the_tasks_that_a_side_did() -> None:
    found = compared(classic(), forebay())
    assert (found.classic.usd_least, found.classic.usd_ratio) == (0.025, 20.0)
    assert (found.usd_least, found.usd_ratio) == (found.forebay.usd_least, found.forebay.usd_ratio) == (0.01, 1.05)


def test_limited_by_is_the_most_frequent_limit_under_load() -> None:
    samples = [
        *(Sample(t=float(t), stage="surge", load=0.9, limited_by="upstream:key") for t in range(5)),
        *(Sample(t=float(t), stage="surge", load=0.1, limited_by="host") for t in range(5, 9)),
        *(Sample(t=float(t), stage="ended", load=0.0, limited_by="host") for t in range(9, 20)),
    ]
    assert side_report(played(samples[-1], samples=tuple(samples)), SETTINGS).limited_by == "upstream:key"
    assert side_report(classic(), SETTINGS).limited_by is None


def test_latencies_are_reported_by_median_and_99th_percentile() -> None:
    figures = side_report(forebay(latencies=tuple(float(n) for n in range(1, 201))), SETTINGS)
    assert (figures.p50_s, figures.p99_s) == (100.0, 198.0)


def test_a_side_that_did_nothing_has_no_cost_and_no_ratio() -> None:
    idle = played(last_sample())
    assert side_report(idle, SETTINGS).usd_per_done is None
    found = compared(idle, forebay())
    assert found.ratio is None
    assert "the classic supervisor 0, 0 a minute;" in found.verdict


def test_a_side_killed_before_it_was_ready_lost_everything() -> None:
    figures = side_report(played(last_sample(), samples=(), ending=Ending.OUT_OF_MEMORY, ended_at=0.0), SETTINGS)
    assert (figures.done, figures.lost, figures.p50_s) == (0, 1000, None)


def test_the_report_compares_forebay_with_each_of_the_others() -> None:
    found = compared(classic(), forebay())
    assert found.ratio == 10.0
    assert found.semaphore_ratio == 1.25
    assert "the classic supervisor 20, 20 a minute (Forebay 10 times as many)" in found.verdict
    assert "one with semaphores 160, 160 a minute (Forebay 1.25 times as many)" in found.verdict
    assert "with semaphores lost 836 and failed 4; Forebay lost 0 and failed 0" in found.verdict
    assert found.usd_least == pytest.approx(0.01)
    assert found.usd_ratio == pytest.approx(1.05)


def test_the_verdict_gives_refusals_costs_and_waste_of_all_sides() -> None:
    verdict = compared(classic(), forebay(bill=BILL)).verdict
    assert "the key refused 1.0 % (7 of 700, 4 for its load), of the classic one's 80 %" in verdict
    assert "of those with semaphores 60 %" in verdict
    assert "(7 of 700, none for its load)" in compared(classic(), forebay(bill=STRAY)).verdict
    assert (
        "A task cost 2 times the least that it needs under Forebay, 20 times under the classic one, 1.4 times"
        in verdict
    )
    assert "46 %, 75 % and 20 % of their tokens were wasted" in verdict
    assert "Forebay was limited by upstream:key, short of requests per minute." in verdict


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.004, "0.4 %"), (0.0996, "10.0 %"), (0.844, "84 %"), (1.0, "100 %")]
)
def test_a_small_share_has_a_decimal(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_verdict_says_whether_memory_ran_out() -> None:
    survived = compared(classic(peak_rss_mb=200.0), forebay()).verdict
    assert "did not run out of memory: it took 200 of 256 MB" in survived
    died = compared(classic(ending=Ending.OUT_OF_MEMORY, ended_at=15.0), forebay()).verdict
    assert "ran out of its 256 MB after 15 s" in died
    killed = compared(classic(), forebay(), semaphore(ending=Ending.OUT_OF_MEMORY, ended_at=15.0)).verdict
    assert "The one with semaphores ran out of memory after 15 s" in killed


def test_the_report_has_every_figure_that_was_promised() -> None:
    raw = msgspec.json.decode(msgspec.json.encode(compared(classic(), forebay())))
    assert {
        "tasks",
        "workers",
        "classic",
        "semaphore",
        "forebay",
        "seed",
        "seconds",
        "memory_limit_mb",
        "python",
    } <= raw.keys()
    figures = (
        *("done", "done_per_minute", "lost", "spilled", "peak_rss_mb", "calls", "calls_429", "tokens"),
        *("refused_share", "wasted_share", "tokens_left", "usd_least", "usd_ratio", "limited_by", "waiting_for"),
        *("tokens_wasted", "usd", "usd_per_done", "p50_s", "p99_s", "out_of_memory"),
    )
    for name in ("classic", "semaphore", "forebay"):
        assert set(figures) <= raw[name].keys()
