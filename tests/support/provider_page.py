"""The error tables of docs/providers.md, from the code; ``python -m tests.support.provider_page`` rewrites them.

A test compares the page with the code, and fails with this command where they differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from forebay.interfaces import Outcome
from forebay.upstream.providers.classify import (
    ERROR_CODES,
    ERROR_RULES,
    NO_RESPONSE,
    OTHER_4XX,
    OTHER_5XX,
    STATUS_RULES,
    STREAM_ERROR_CODES,
    WORDINGS,
    ErrorKind,
    StatusRule,
)

PAGE: Final = Path(__file__).parents[2] / "docs" / "providers.md"
COMMAND: Final = "python -m tests.support.provider_page"
_BEGIN: Final = f"<!-- begin: printed from forebay/upstream/providers/classify.py by {COMMAND} -->\n"
_END: Final = "<!-- end -->\n"

_COUNTS_FOR: Final = {
    Outcome.SUCCESS: "a success",
    Outcome.OVERLOAD: "congestion",
    Outcome.FAULT: "a fault",
    Outcome.IGNORED: "nothing",
}


def error_tables() -> str:
    """Return the tables as Markdown."""
    return "\n".join([*_statuses(), "", *_codes(), "", *_wordings(), "", *_rules()]) + "\n"


def updated(page: str) -> str:
    """Return the page with the tables of the code between its two marks.

    Raises:
        ValueError: it has no marks.
    """
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END, 1)
    return f"{before}{_BEGIN}\n{error_tables()}\n{_END}{after}"


def _statuses() -> Iterable[str]:
    grouped: dict[StatusRule, list[str]] = defaultdict(list)
    for status, rule in STATUS_RULES.items():
        grouped[rule].append(f"{status}")
    rows = [(", ".join(statuses), rule) for rule, statuses in grouped.items()]
    yield "| status | means | unless the body says |"
    yield "| --- | --- | --- |"
    for statuses, rule in [*rows, ("any other 4xx", OTHER_4XX), ("500, 502, 504 and any other 5xx", OTHER_5XX)]:
        kind = _name(rule.kind)
        if rule.by_headers is not None:
            kind = f"{_name(rule.by_headers)} with Retry-After, or with a rate limit that has nothing left; else {kind}"
        body = [kind for kind in ErrorKind if kind in rule.by_body and kind is not rule.kind]
        others = "any other kind" if rule.by_body == frozenset(ErrorKind) else ", ".join(map(_name, body))
        yield f"| {statuses} | {kind} | {others} |"
    yield f"| none: a connection error, a stream that is cut off, or an unusual silence | {_name(NO_RESPONSE)} | |"


def _codes() -> Iterable[str]:
    yield "| error code or type | means |"
    yield "| --- | --- |"
    for kind, codes in _by_kind(ERROR_CODES).items():
        yield f"| {', '.join(f'`{code}`' for code in codes)} | {_name(kind)} |"
    for kind, codes in _by_kind(STREAM_ERROR_CODES).items():
        yield f"| in the middle of a stream also {', '.join(f'`{code}`' for code in codes)} | {_name(kind)} |"


def _wordings() -> Iterable[str]:
    yield "A message without such a code is searched for these regular expressions; the first that matches counts:"
    yield ""
    for wording, kind in WORDINGS:
        yield f"- {_name(kind)}: `{wording.pattern}`"


def _rules() -> Iterable[str]:
    yield "| kind | meaning | retried | uses an attempt | falls back | counts as | what reacts | the caller gets |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for kind, rule in ERROR_RULES.items():
        if kind is not ErrorKind.SUCCESS:
            attempt = "" if not rule.retryable else _yes(rule.uses_attempt)
            cells = (_name(kind), rule.meaning, _yes(rule.retryable), attempt, _yes(rule.can_fall_back))
            yield f"| {' | '.join((*cells, _COUNTS_FOR[rule.outcome], rule.counted_by, rule.caller_gets))} |"


def _by_kind(codes: Mapping[str, ErrorKind]) -> dict[ErrorKind, list[str]]:
    found: dict[ErrorKind, list[str]] = defaultdict(list)
    for code, kind in codes.items():
        found[kind].append(code)
    return found


def _name(kind: ErrorKind) -> str:
    return f"`{kind.name}`"


def _yes(value: bool) -> str:  # noqa: FBT001 - it is what is printed
    return "yes" if value else "no"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
