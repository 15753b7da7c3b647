"""What the demo found, as the numbers of ``report.json``. Pure."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from demo.child import Ending
from demo.kept import Kept
from demo.sample import Sample
from demo.settings import Settings
from forebay.task import Priority

FORMAT: Final = 2
_ALIKE: Final = 0.8  # and its inverse: within these two numbers of calls are about the same
_WHOLE: Final = 0.1  # shares below it are told with a decimal
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
        refused_share: `calls_429` over `calls`.
        stray_429: of `calls_429`, those that the plant gave whatever the load; None with a real provider.
        tokens, usd: as billed by the plant; with a real provider as told in its answers.
        tokens_wasted: tokens billed that are in no done task: cut off, repeated, of a run that failed, or of one that
            had not ended when its process did.
        wasted_share: `tokens_wasted` over `tokens`.
        tokens_left: tokens billed for answers that nobody got whole, since who asked had left or the connection broke;
            None with a real provider, which does not tell.
        usd_per_done: dollars per task done; None if none was, or the price is not known.
        usd_least: what a task that it did costs if each of its three calls is paid once, as a mean; None likewise.
        usd_ratio: the first over the second.
        binding: what bound it most of the time, by its own word; None if it has none.
        scarce: what its calls waited for most of the time, likewise.
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
    binding: str | None
    scarce: str | None
    p50_s: float | None
    p99_s: float | None
    cpu_s: float
    plant: Mapping[str, Any] | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it.

    Attributes:
        ratio: tasks done a minute, Forebay's over the classic's; None if the classic did none.
        usd_least, usd_ratio: Forebay's.
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


def _share(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _most_often(names: Iterable[str | None]) -> str | None:
    counts = Counter(name for name in names if name is not None)
    return counts.most_common(1)[0][0] if counts else None


def side(played: Played, settings: Settings) -> SideReport:
    """One side's figures."""
    last, plant, on_disk = played.last, played.plant, played.kept
    done, failed = (last.done, last.failed) if on_disk is None else (on_disk.done, on_disk.failed)
    spilled = 0 if on_disk is None else on_disk.to_do
    seconds = played.ended_at if done >= settings.tasks else settings.seconds
    tokens = plant["input_tokens"] + plant["output_tokens"] if plant else last.tokens
    wasted = max(0, tokens - last.useful_tokens)
    usd = plant["usd"] if plant else last.usd
    each = usd / done if done and usd else None
    least = last.useful_usd / last.done if last.done and last.useful_usd else None
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
        refused_share=_share(last.calls_429, last.calls),
        stray_429=plant["by_reason"].get("stray", 0) if plant else None,
        tokens=tokens,
        tokens_wasted=wasted,
        wasted_share=_share(wasted, tokens),
        tokens_left=plant["wasted_input_tokens"] + plant["wasted_output_tokens"] if plant else None,
        usd=round(usd, 6),
        usd_per_done=None if each is None else round(each, 6),
        usd_least=None if least is None else round(least, 6),
        usd_ratio=round(each / least, 3) if each and least else None,
        binding=_most_often(sample.binding for sample in played.samples if sample.load),
        scarce=_most_often(sample.scarce for sample in played.samples),
        p50_s=p50,
        p99_s=p99,
        cpu_s=last.cpu_s,
        plant=plant,
    )


def report(classic: Played, forebay: Played, settings: Settings, provider: str) -> Report:
    """Both sides, and what to make of them."""
    a, b = side(classic, settings), side(forebay, settings)
    ratio = round(b.done_per_minute / a.done_per_minute, 2) if a.done else None
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
        usd_least=b.usd_least,
        usd_ratio=b.usd_ratio,
        verdict=verdict(a, b, ratio, settings),
    )


def percent(share: float) -> str:
    """A share as one reads it: ``0.3 %``, ``84 %``."""
    return f"{100 * share:.1f} %" if 0 < share < _WHOLE else f"{100 * share:.0f} %"


def bound(told: SideReport) -> str:
    """What bound a side, and what that was short of."""
    name = told.binding or "nothing"
    return f"{name}, short of {told.scarce}" if told.scarce and name.startswith("upstream:") else name


def _refusals(a: SideReport, b: SideReport) -> str:
    stray = ""
    if b.calls_429 and b.stray_429 is not None:
        ours = b.calls_429 - b.stray_429
        stray = f", {ours or 'none'} for its load"
    return (
        f"Of Forebay's calls the key refused {percent(b.refused_share)} ({b.calls_429:,} of {b.calls:,}{stray}), of the"
        f" classic one's {percent(a.refused_share)}."
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
    says.append(_refusals(a, b))
    if a.usd_ratio and b.usd_ratio:
        wasted = f"{percent(b.wasted_share)} and {percent(a.wasted_share)} of their tokens went for nothing"
        says.append(
            f"A task cost {b.usd_ratio:.4g} times the least that it needs under Forebay, {a.usd_ratio:.3g} times under"
            f" the classic one; {wasted}."
        )
    if b.binding:
        says.append(f"What bound Forebay was {bound(b)}.")
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
