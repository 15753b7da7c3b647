"""The figures of ``report.json``, computed from the sides' runs. Pure."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from demo.sample import Sample, Side
from demo.settings import Settings
from demo.side_process import Ending
from demo.stored_tasks import StoredTasks
from forebay.task import Priority

FORMAT: Final = 3
_SIMILAR: Final = 0.8  # numbers of answers within this ratio, or its inverse, are about the same
_DECIMAL_BELOW: Final = 0.1  # shares below it are printed with a decimal
_FAR: Final = 1.5  # from this ratio of tasks done on, the verdict explains the difference


class SideRun(msgspec.Struct, frozen=True, kw_only=True):
    """One side's run, as its parent process saw it.

    Attributes:
        samples: its reports, the latest last.
        latencies: seconds from submission to done, of each task done.
        memory: pairs of seconds and resident megabytes.
        peak_rss_mb: of its process.
        ending: how the process ended.
        ended_at: seconds after it was ready.
        stored: what was left in its task store; None for a side without one.
        bill: what the simulated provider counted and billed; None if a real provider was called.
    """

    samples: tuple[Sample, ...]
    latencies: tuple[float, ...]
    memory: tuple[tuple[float, float], ...]
    peak_rss_mb: float
    ending: Ending
    ended_at: float
    stored: StoredTasks | None = None
    bill: Mapping[str, Any] | None = None

    @property
    def last(self) -> Sample:
        """The latest sample; an empty one if the process ended before it was ready."""
        return self.samples[-1] if self.samples else Sample(t=0.0, stage="starting")


class SideReport(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one side.

    Attributes:
        done, failed, spilled, lost: they add up to the tasks. A failed task is reported as such; a lost one is neither
            done nor failed nor spilled: it was in memory when the process ended.
        done_per_minute: over the time that the side was given, or that it needed if it did all.
        done_by: tasks done, by priority.
        peak_rss_mb: resident memory of its process.
        out_of_memory: the process exceeded its limit and was killed.
        ending, ended_at_s: how and when its process ended.
        calls: HTTP attempts, the SDK's retries included. `calls_answered` of them got an answer, `calls_429` and
            `calls_5xx` such a status; the others found or kept no connection, or were under way at the end.
        refused_share: `calls_429` over `calls`.
        stray_429: of `calls_429`, those that the simulated provider sends whatever the load; None with a real one.
        tokens, usd: as billed by the simulated provider, or as reported in the answers of a real one.
        tokens_wasted: tokens billed that belong to no task done: cut off, repeated, of a run that failed, or of a run
            that had not ended when its process did.
        wasted_share: `tokens_wasted` over `tokens`.
        tokens_left: tokens billed for answers that nobody received whole, because the caller had left or the connection
            broke; None with a real provider, which does not tell.
        usd_per_done: dollars per task done; None if none was, or the price is not known.
        usd_least: mean cost of a task done if each of its three calls is paid once; None likewise.
        usd_ratio: `usd_per_done` over `usd_least`.
        limited_by: what limited it most of the time; None if it does not know.
        waiting_for: what its calls waited for most of the time; None likewise.
        p50_s, p99_s: seconds from submission to done, of the tasks done.
        cpu_s: processor seconds of its process.
        bill: what the simulated provider counted, for comparison.
    """

    done: int
    failed: int
    spilled: int
    lost: int
    done_per_minute: float
    done_by: dict[str, int]
    peak_rss_mb: float
    out_of_memory: bool
    ending: str
    ended_at_s: float
    calls: int
    calls_answered: int
    calls_429: int
    calls_5xx: int
    refused_share: float
    stray_429: int | None
    tokens: int
    tokens_wasted: int
    wasted_share: float
    tokens_left: int | None
    usd: float
    usd_per_done: float | None
    usd_least: float | None
    usd_ratio: float | None
    limited_by: str | None
    waiting_for: str | None
    p50_s: float | None
    p99_s: float | None
    cpu_s: float
    bill: Mapping[str, Any] | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one demo.

    Attributes:
        ratio, semaphore_ratio: tasks done a minute, Forebay's over the classic side's and over the semaphore side's;
            None if that side did none.
        usd_least, usd_ratio: Forebay's.
        verdict: the same in words.
    """

    format: int = FORMAT
    tasks: int
    workers: int
    slots: int
    seed: int
    seconds: float
    memory_limit_mb: int
    sdk_retries: int
    provider: str
    python: str
    classic: SideReport
    semaphore: SideReport
    forebay: SideReport
    ratio: float | None
    semaphore_ratio: float | None
    usd_least: float | None
    usd_ratio: float | None
    verdict: str

    def side(self, side: Side) -> SideReport:
        """Return the figures of a side."""
        found: SideReport = getattr(self, side.value)
        return found


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest of `values` that at least `share` of them do not exceed; None if there are no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _share(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _most_frequent(names: Iterable[str | None]) -> str | None:
    counts = Counter(name for name in names if name is not None)
    return counts.most_common(1)[0][0] if counts else None


def side_report(run: SideRun, settings: Settings) -> SideReport:
    """Return the figures of one side's run."""
    last, bill, stored = run.last, run.bill, run.stored
    done, failed = (last.done, last.failed) if stored is None else (stored.done, stored.failed)
    spilled = 0 if stored is None else stored.to_do
    seconds = run.ended_at if done >= settings.tasks else settings.seconds
    tokens = bill["input_tokens"] + bill["output_tokens"] if bill else last.tokens
    wasted = max(0, tokens - last.useful_tokens)
    usd = bill["usd"] if bill else last.usd
    each = usd / done if done and usd else None
    least = last.useful_usd / last.done if last.done and last.useful_usd else None
    p50, p99 = (quantile(run.latencies, share) for share in (0.50, 0.99))
    return SideReport(
        done=done,
        failed=failed,
        spilled=spilled,
        lost=settings.tasks - done - failed - spilled,
        done_per_minute=round(60 * done / seconds, 1),
        done_by={priority.name.lower(): last.done_by[priority] for priority in Priority},
        peak_rss_mb=round(run.peak_rss_mb, 1),
        out_of_memory=run.ending is Ending.OUT_OF_MEMORY,
        ending=run.ending.value,
        ended_at_s=round(run.ended_at, 1),
        calls=last.calls,
        calls_answered=last.answered,
        calls_429=last.calls_429,
        calls_5xx=last.calls_5xx,
        refused_share=_share(last.calls_429, last.calls),
        stray_429=bill["by_reason"].get("stray", 0) if bill else None,
        tokens=tokens,
        tokens_wasted=wasted,
        wasted_share=_share(wasted, tokens),
        tokens_left=bill["wasted_input_tokens"] + bill["wasted_output_tokens"] if bill else None,
        usd=round(usd, 6),
        usd_per_done=None if each is None else round(each, 6),
        usd_least=None if least is None else round(least, 6),
        usd_ratio=round(each / least, 3) if each and least else None,
        limited_by=_most_frequent(sample.limited_by for sample in run.samples if sample.load),
        waiting_for=_most_frequent(sample.waiting_for for sample in run.samples),
        p50_s=p50,
        p99_s=p99,
        cpu_s=last.cpu_s,
        bill=bill,
    )


def report(runs: Mapping[Side, SideRun], settings: Settings, provider: str) -> Report:
    """Return the figures of all sides, and a verdict."""
    classic, semaphore, forebay = (
        side_report(runs[side], settings) for side in (Side.CLASSIC, Side.SEMAPHORE, Side.FOREBAY)
    )
    return Report(
        tasks=settings.tasks,
        workers=settings.workers,
        slots=settings.slots,
        seed=settings.seed,
        seconds=settings.seconds,
        memory_limit_mb=settings.memory_mb,
        sdk_retries=settings.sdk_retries,
        provider=provider,
        python=platform.python_version(),
        classic=classic,
        semaphore=semaphore,
        forebay=forebay,
        ratio=_ratio(forebay, classic),
        semaphore_ratio=_ratio(forebay, semaphore),
        usd_least=forebay.usd_least,
        usd_ratio=forebay.usd_ratio,
        verdict=_verdict(classic, semaphore, forebay, settings),
    )


def _ratio(forebay: SideReport, other: SideReport) -> float | None:
    return round(forebay.done_per_minute / other.done_per_minute, 2) if other.done else None


def percent(share: float) -> str:
    """Return a share as people write it: ``0.3 %``, ``84 %``."""
    return f"{100 * share:.1f} %" if 0 < share < _DECIMAL_BELOW else f"{100 * share:.0f} %"


def limit_of(side: SideReport) -> str:
    """Return what limited a side, and what that was short of."""
    name = side.limited_by or "nothing"
    return f"{name}, short of {side.waiting_for}" if side.waiting_for and name.startswith("upstream:") else name


def _verdict(classic: SideReport, semaphore: SideReport, forebay: SideReport, settings: Settings) -> str:
    """Return the findings in words, the unwelcome ones too."""
    others = ("the classic supervisor", classic), ("one with semaphores", semaphore)
    compared = "; ".join(_compared(name, forebay, other) for name, other in others)
    sentences = [f"Forebay did {forebay.done:,} tasks, {forebay.done_per_minute:g} a minute; {compared}."]
    ratio = _ratio(forebay, classic)
    similar = forebay.calls_answered and _SIMILAR < classic.calls_answered / forebay.calls_answered < 1 / _SIMILAR
    if similar and (ratio is None or ratio > _FAR):
        sentences.append(
            f"The key gave the classic one about as many answers as Forebay, {classic.calls_answered:,} and"
            f" {forebay.calls_answered:,}; they differ in how many were useful."
        )
    sentences.append(_refusals(classic, semaphore, forebay))
    if classic.usd_ratio and semaphore.usd_ratio and forebay.usd_ratio:
        sentences.append(
            f"A task cost {forebay.usd_ratio:.4g} times the least that it needs under Forebay,"
            f" {classic.usd_ratio:.3g} times under the classic one, {semaphore.usd_ratio:.3g} times with semaphores;"
            f" {percent(forebay.wasted_share)}, {percent(classic.wasted_share)} and {percent(semaphore.wasted_share)}"
            " of their tokens were wasted."
        )
    if forebay.limited_by:
        sentences.append(f"Forebay was limited by {limit_of(forebay)}.")
    if classic.out_of_memory:
        sentences.append(f"The classic one ran out of its {settings.memory_mb} MB after {classic.ended_at_s:.0f} s.")
    else:
        sentences.append(
            f"The classic one did not run out of memory: it took {classic.peak_rss_mb:.0f} of {settings.memory_mb} MB."
        )
    sentences.extend(
        f"{name} ran out of memory after {side.ended_at_s:.0f} s."
        for name, side in (("The one with semaphores", semaphore), ("Forebay", forebay))
        if side.out_of_memory
    )
    sentences.append(
        f"The classic one lost {classic.lost:,} tasks and failed {classic.failed:,}; the one with semaphores lost"
        f" {semaphore.lost:,} and failed {semaphore.failed:,}; Forebay lost {forebay.lost:,} and failed"
        f" {forebay.failed:,}."
    )
    return " ".join(sentences)


def _compared(name: str, forebay: SideReport, other: SideReport) -> str:
    ratio = _ratio(forebay, other)
    times = f" (Forebay {ratio:g} times as many)" if ratio else ""
    return f"{name} {other.done:,}, {other.done_per_minute:g} a minute{times}"


def _refusals(classic: SideReport, semaphore: SideReport, forebay: SideReport) -> str:
    stray = ""
    if forebay.calls_429 and forebay.stray_429 is not None:
        for_load = forebay.calls_429 - forebay.stray_429
        stray = f", {for_load or 'none'} for its load"
    return (
        f"Of Forebay's calls the key refused {percent(forebay.refused_share)} ({forebay.calls_429:,} of"
        f" {forebay.calls:,}{stray}), of the classic one's {percent(classic.refused_share)}, of those with semaphores"
        f" {percent(semaphore.refused_share)}."
    )
