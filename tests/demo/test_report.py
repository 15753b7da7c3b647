"""The figures of the report, from what the sides told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from demo.child import Ending
from demo.kept import Kept
from demo.report import Played, percent, quantile, report, side
from demo.sample import Sample
from demo.settings import Settings

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


def told(**counts: Any) -> Sample:
    return Sample(t=60.0, stage="ended", **counts)


def played(last: Sample, **rest: Any) -> Played:
    known: dict[str, Any] = {
        "samples": (last,),
        "latencies": (),
        "memory": (),
        "peak_rss_mb": 100.0,
        "ending": Ending.TIME_UP,
        "ended_at": 60.0,
    }
    return Played(**known | rest)


def classic(**rest: Any) -> Played:
    counts = {"done": 20, "failed": 30, "usd": 10.0, "input_tokens": 900, "output_tokens": 100, "useful_tokens": 250}
    counts["useful_usd"] = 0.5
    return played(told(**counts, calls=5000, calls_429=4000, answered=900), **rest)


def forebay(**rest: Any) -> Played:
    counts: dict[str, Any] = {"done": 200, "usd": 2.1, "useful_usd": 2.0, "input_tokens": 2000, "useful_tokens": 1900}
    counts |= {"calls_429": 7, "load": 0.5, "binding": "upstream:key", "scarce": "requests per minute"}
    return played(told(**counts, calls=700, answered=650), **{"kept": Kept(waiting=790, leased=10, done=200)} | rest)


def test_a_quantile_is_a_value_that_was_seen() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert quantile(values, 0.5) == 3.0
    assert quantile(values, 0.99) == 5.0
    assert quantile(values, 0.0) == 1.0
    assert quantile([7.0], 0.5) == 7.0
    assert quantile([], 0.5) is None


def test_what_the_classic_one_has_not_ended_is_lost() -> None:
    figures = side(classic(), SETTINGS)
    assert (figures.done, figures.failed, figures.spilled, figures.lost) == (20, 30, 0, 950)


def test_what_is_on_disk_is_not_lost() -> None:
    figures = side(forebay(), SETTINGS)
    assert (figures.done, figures.spilled, figures.lost) == (200, 800, 0)


def test_a_row_that_is_missing_from_the_ledger_is_a_task_lost() -> None:
    assert side(forebay(kept=Kept(waiting=790, done=200)), SETTINGS).lost == 10


def test_the_rate_is_over_the_whole_time_also_for_a_process_that_died_early() -> None:
    figures = side(classic(ending=Ending.OUT_OF_MEMORY, ended_at=15.0), SETTINGS)
    assert figures.done_per_minute == 20.0
    assert figures.out_of_memory


def test_who_did_all_is_measured_by_the_time_that_took() -> None:
    figures = side(forebay(kept=Kept(done=1000), ended_at=30.0), SETTINGS)
    assert figures.done_per_minute == 2000.0


def test_wasted_is_what_no_done_task_is_made_of() -> None:
    assert side(classic(), SETTINGS).tokens_wasted == 750
    assert side(forebay(), SETTINGS).tokens_wasted == 100


def test_the_plants_bill_goes_before_what_the_side_has_seen() -> None:
    figures = side(forebay(plant=BILL), SETTINGS)
    assert (figures.tokens, figures.tokens_wasted, figures.usd, figures.usd_per_done) == (3500, 1600, 4.0, 0.02)


def test_shares_are_of_what_was_sent_and_of_what_was_billed() -> None:
    figures = side(forebay(plant=BILL), SETTINGS)
    assert figures.refused_share == 0.01
    assert figures.wasted_share == pytest.approx(1600 / 3500, abs=1e-5)
    assert side(played(told()), SETTINGS).refused_share == side(played(told()), SETTINGS).wasted_share == 0.0


def test_the_plant_tells_what_reached_nobody_and_what_no_load_caused_and_a_real_provider_does_not() -> None:
    figures = side(forebay(plant=BILL), SETTINGS)
    assert (figures.tokens_left, figures.stray_429) == (70, 3)
    figures = side(forebay(), SETTINGS)
    assert (figures.tokens_left, figures.stray_429) == (None, None)


def test_each_side_is_measured_by_what_the_tasks_that_it_did_need() -> None:
    found = report(classic(), forebay(), SETTINGS, "plant")
    assert (found.classic.usd_least, found.classic.usd_ratio) == (0.025, 20.0)
    assert (found.usd_least, found.usd_ratio) == (found.forebay.usd_least, found.forebay.usd_ratio) == (0.01, 1.05)


def test_what_bound_is_what_did_so_most_of_the_time_that_there_was_a_load() -> None:
    samples = [
        *(Sample(t=float(t), stage="surge", load=0.9, binding="upstream:key") for t in range(5)),
        *(Sample(t=float(t), stage="surge", load=0.1, binding="host") for t in range(5, 9)),
        *(Sample(t=float(t), stage="ended", load=0.0, binding="host") for t in range(9, 20)),
    ]
    assert side(played(samples[-1], samples=tuple(samples)), SETTINGS).binding == "upstream:key"
    assert side(classic(), SETTINGS).binding is None


def test_latencies_are_told_by_their_median_and_their_tail() -> None:
    figures = side(forebay(latencies=tuple(float(n) for n in range(1, 201))), SETTINGS)
    assert (figures.p50_s, figures.p99_s) == (100.0, 198.0)


def test_a_side_that_did_nothing_has_no_price_and_no_ratio() -> None:
    idle = played(told())
    assert side(idle, SETTINGS).usd_per_done is None
    found = report(idle, forebay(), SETTINGS, "plant")
    assert found.ratio is None
    assert "the classic supervisor 0, 0 a minute." in found.verdict


def test_a_side_killed_before_it_was_ready_lost_everything() -> None:
    figures = side(played(told(), samples=(), ending=Ending.OUT_OF_MEMORY, ended_at=0.0), SETTINGS)
    assert (figures.done, figures.lost, figures.p50_s) == (0, 1000, None)


def test_the_report_compares_both() -> None:
    found = report(classic(), forebay(), SETTINGS, "plant")
    assert found.ratio == 10.0
    assert found.usd_least == pytest.approx(0.01)
    assert found.usd_ratio == pytest.approx(1.05)
    assert "Forebay 10 times as many" in found.verdict


def test_the_verdict_says_what_was_refused_and_what_went_for_nothing() -> None:
    verdict = report(classic(), forebay(plant=BILL), SETTINGS, "plant").verdict
    assert "the key refused 1.0 % (7 of 700, 4 for its load), of the classic one's 80 %" in verdict
    assert "(7 of 700, none for its load)" in report(classic(), forebay(plant=STRAY), SETTINGS, "plant").verdict
    assert "A task cost 2 times the least that it needs under Forebay, 20 times under the classic one" in verdict
    assert "46 % and 75 % of their tokens went for nothing" in verdict
    assert "What bound Forebay was upstream:key, short of requests per minute." in verdict


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.004, "0.4 %"), (0.0996, "10.0 %"), (0.844, "84 %"), (1.0, "100 %")]
)
def test_a_small_share_has_a_decimal(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_verdict_says_whether_memory_ran_out() -> None:
    survived = report(classic(peak_rss_mb=200.0), forebay(), SETTINGS, "plant").verdict
    assert "did not run out of memory: it took 200 of 256 MB" in survived
    died = report(classic(ending=Ending.OUT_OF_MEMORY, ended_at=15.0), forebay(), SETTINGS, "plant").verdict
    assert "ran out of its 256 MB after 15 s" in died


def test_the_report_has_every_figure_that_was_promised() -> None:
    raw = msgspec.json.decode(msgspec.json.encode(report(classic(), forebay(), SETTINGS, "plant")))
    assert {"tasks", "workers", "classic", "forebay", "seed", "seconds", "memory_limit_mb", "python"} <= raw.keys()
    figures = (
        *("done", "done_per_minute", "lost", "spilled", "peak_rss_mb", "calls", "calls_429", "tokens"),
        *("refused_share", "wasted_share", "tokens_left", "usd_least", "usd_ratio", "binding", "scarce"),
        *("tokens_wasted", "usd", "usd_per_done", "p50_s", "p99_s", "out_of_memory"),
    )
    for name in ("classic", "forebay"):
        assert set(figures) <= raw[name].keys()
