"""What the demo found, as the numbers of ``report.json``. Pure."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from forebay.demo.child import Ending
from forebay.demo.kept import Kept
from forebay.demo.sample import Sample
from forebay.demo.settings import Settings
from forebay.task import Priority

FORMAT: Final = 1
_ALIKE: Final = 0.8  # and its inverse: within these two numbers of calls are about the same
_FAR: Final = 1.5  # from this ratio of tasks done on, one asks why


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """One side's run, as it was seen from outside.

    Attributes:
        samples: what it told, the last one last.
        latencies: seconds from submission to done, of each task done.
        memory: seconds and resident megabytes.
        peak_rss_mb: of its process.
        ending: how that ended.
        ended_at: seconds after it was ready.
        kept: what was left in its ledger; None for a side that has none.
        plant: what the plant counted and billed; None if a real provider was called.
    """

    samples: tuple[Sample, ...]
    latencies: tuple[float, ...]
    memory: tuple[tuple[float, float], ...]
    peak_rss_mb: float
    ending: Ending
    ended_at: float
    kept: Kept | None = None
    plant: Mapping[str, Any] | None = None

    @property
    def last(self) -> Sample:
        """The newest sample; one of nothing if it was ended before it was ready."""
        return self.samples[-1] if self.samples else Sample(t=0.0, stage="starting")


class SideReport(msgspec.Struct, frozen=True, kw_only=True):
    """One side's figures.

    Attributes:
        done, failed, spilled, lost: they add up to the tasks. Failed tasks are told as such; lost ones are neither done
            nor failed nor kept anywhere: they went with their process.
        done_per_minute: over the whole time that the side was given, or that it needed if it did all.
        done_by: done, by priority.
        peak_rss_mb: resident memory of its process.
        out_of_memory: it passed the limit and was ended for it.
        ending, ended_at_s: how its process ended, and when.
        calls: HTTP attempts, the SDK's retries included; of them `calls_answered` brought an answer, `calls_429` and
            `calls_5xx` a refusal; the others found no connection or lost it, or were under way at the end.
        tokens, usd: as billed by the plant; with a real provider as told in its answers.
        tokens_wasted: tokens billed that are in no done task: cut off, repeated, or of a run that failed.
        usd_per_done: dollars per task done; None if none was, or the price is not known.
        p50_s, p99_s: seconds from submission to done, of the tasks done.
        cpu_s: processor seconds of its process.
        plant: what the plant counted, to compare.
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
    tokens: int
    tokens_wasted: int
    usd: float
    usd_per_done: float | None
    p50_s: float | None
    p99_s: float | None
    cpu_s: float
    plant: Mapping[str, Any] | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it.

    Attributes:
        ratio: tasks done a minute, Forebay's over the classic's; None if the classic did none.
        usd_least: what a task of this surge costs if each of its three calls is paid once: the mean over those that
            Forebay did.
        usd_ratio: Forebay's dollars per task done over that.
        verdict: the same in a sentence or two.
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
    forebay: SideReport
    ratio: float | None
    usd_least: float | None
    usd_ratio: float | None
    verdict: str


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest of `values` that at least `share` of them do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def side(played: Played, settings: Settings) -> SideReport:
    """One side's figures."""
    last, plant, on_disk = played.last, played.plant, played.kept
    done, failed = (last.done, last.failed) if on_disk is None else (on_disk.done, on_disk.failed)
    spilled = 0 if on_disk is None else on_disk.to_do
    seconds = played.ended_at if done >= settings.tasks else settings.seconds
    tokens = plant["input_tokens"] + plant["output_tokens"] if plant else last.tokens
    usd = plant["usd"] if plant else last.usd
    p50, p99 = (quantile(played.latencies, share) for share in (0.50, 0.99))
    return SideReport(
        done=done,
        failed=failed,
        spilled=spilled,
        lost=settings.tasks - done - failed - spilled,
        done_per_minute=round(60 * done / seconds, 1),
        done_by={priority.name.lower(): last.done_by[priority] for priority in Priority},
        peak_rss_mb=round(played.peak_rss_mb, 1),
        out_of_memory=played.ending is Ending.OUT_OF_MEMORY,
        ending=played.ending.value,
        ended_at_s=round(played.ended_at, 1),
        calls=last.calls,
        calls_answered=last.answered,
        calls_429=last.calls_429,
        calls_5xx=last.calls_5xx,
        tokens=tokens,
        tokens_wasted=max(0, tokens - last.useful_tokens),
        usd=round(usd, 6),
        usd_per_done=round(usd / done, 6) if done and usd else None,
        p50_s=p50,
        p99_s=p99,
        cpu_s=last.cpu_s,
        plant=plant,
    )


def report(classic: Played, forebay: Played, settings: Settings, provider: str) -> Report:
    """Both sides, and what to make of them."""
    a, b = side(classic, settings), side(forebay, settings)
    ratio = round(b.done_per_minute / a.done_per_minute, 2) if a.done else None
    least = forebay.last.useful_usd / forebay.last.done if forebay.last.done and forebay.last.useful_usd else None
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
        classic=a,
        forebay=b,
        ratio=ratio,
        usd_least=None if least is None else round(least, 6),
        usd_ratio=round(b.usd_per_done / least, 3) if least and b.usd_per_done else None,
        verdict=verdict(a, b, ratio, settings),
    )


def verdict(a: SideReport, b: SideReport, ratio: float | None, settings: Settings) -> str:
    """The findings in words, the uncomfortable ones too."""
    times = f": Forebay {ratio:g} times as many" if ratio else ""
    ours = f"Forebay did {b.done:,} tasks, {b.done_per_minute:g} a minute"
    says = [f"{ours}; the classic supervisor {a.done:,}, {a.done_per_minute:g} a minute{times}."]
    alike = b.calls_answered and _ALIKE < a.calls_answered / b.calls_answered < 1 / _ALIKE
    if alike and (ratio is None or ratio > _FAR):
        says.append(
            f"The key gave both about as many answers, {a.calls_answered:,} and {b.calls_answered:,}:"
            " what differs is how many of them were of use."
        )
    if a.out_of_memory:
        says.append(f"The classic one ran out of its {settings.memory_mb} MB after {a.ended_at_s:.0f} s.")
    else:
        says.append(
            f"The classic one did not run out of memory: it took {a.peak_rss_mb:.0f} of {settings.memory_mb} MB."
        )
    if b.out_of_memory:
        says.append(f"Forebay ran out of memory after {b.ended_at_s:.0f} s.")
    says.append(f"The classic one lost {a.lost:,} tasks and failed {a.failed:,}; Forebay {b.lost:,} and {b.failed:,}.")
    return " ".join(says)
