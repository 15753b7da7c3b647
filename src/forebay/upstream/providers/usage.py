"""What a call has used, as the provider counted it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

_MOST: Final = 10**8  # tokens of one call: ten times the largest context window that there is; more is no count
_NUMBER: Final = (int, float)  # `int | float` would be built anew each time that it is asked for


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one call.

    Attributes:
        input_tokens: all that was sent, what came from a cache included.
        output_tokens: all that was made, thinking included.
        cache_read_tokens: of the input, what was read from a cache.
        cache_write_tokens: of the input, what was written to one.
        estimated: whether Forebay guessed some of it, for the provider did not say.
    """

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    estimated: bool = False


def _absurd(value: object) -> bool:
    """Whether it is a number, and cannot be one of tokens."""
    return isinstance(value, _NUMBER) and not 0 <= value <= _MOST


def read_token_count(value: object) -> int:
    """A number of tokens out of JSON; 0 if it is none."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _NUMBER)):
        return 0
    return int(value) if 0 <= value <= _MOST else 0


def read_usage(value: Any, known: Usage | None = None) -> Usage | None:
    """Usage out of a ``usage`` object of any provider; None if it is not one, or claims what no call can use.

    OpenAI counts what came from a cache within ``prompt_tokens`` or ``input_tokens``. Anthropic counts it beside
    ``input_tokens``, in two fields of its own, and by these it is known. Sources: the references of both, and the types
    of their SDKs (``CompletionUsage``, ``ResponseUsage``, ``BilledUsage``, ``MessageDeltaUsage``); DeepSeek's
    ``prompt_cache_hit_tokens``.

    Args:
        told: what the JSON held.
        known: what an earlier event of the same answer said; what this one leaves out is kept. Both are totals.
    """
    if not isinstance(value, dict):
        return None
    cache_read, cache_write = value.get("cache_read_input_tokens"), value.get("cache_creation_input_tokens")
    output = value.get("completion_tokens", value.get("output_tokens"))
    told_input = value.get("prompt_tokens", value.get("input_tokens"))
    if not isinstance(told_input, _NUMBER) and not isinstance(output, _NUMBER):
        return None
    if any(map(_absurd, (told_input, output, cache_read, cache_write))):
        return None  # one slip must not spend a month's budget: what was reserved counts
    output_tokens = read_token_count(output)
    if known is not None:
        output_tokens = max(output_tokens, known.output_tokens)
    if not isinstance(told_input, _NUMBER):
        cached, written = (known.cache_read_tokens, known.cache_write_tokens) if known else (0, 0)
        input_tokens = known.input_tokens if known else 0
    elif isinstance(cache_read, _NUMBER) or isinstance(cache_write, _NUMBER):
        cached, written = read_token_count(cache_read), read_token_count(cache_write)
        input_tokens = read_token_count(told_input) + cached + written
    elif known is not None and (known.cache_read_tokens or known.cache_write_tokens):
        cached, written = known.cache_read_tokens, known.cache_write_tokens
        input_tokens = max(
            read_token_count(told_input), known.input_tokens
        )  # a later event that does not tell of the cache
    else:
        details = value.get("prompt_tokens_details", value.get("input_tokens_details"))
        hit = details.get("cached_tokens") if isinstance(details, dict) else value.get("prompt_cache_hit_tokens")
        input_tokens = read_token_count(told_input)
        cached, written = min(read_token_count(hit), input_tokens), 0
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=cached,
        cache_write_tokens=written,
    )


class InputTokenRatio:
    """How many tokens an account counts for each that was estimated: a moving mean, learned from what it settled."""

    __slots__ = ("_seen", "value")

    def __init__(self) -> None:
        self.value = 1.0
        self._seen = 0

    def observe(self, estimated: int, counted: int) -> None:
        """A call of so many estimated input tokens was charged so many. What is no count says nothing."""
        if estimated <= 0 or counted <= 0:
            return
        self._seen += 1
        newest = _credible(counted / estimated)
        self.value = _credible(self.value + (newest - self.value) * max(0.05, 1.0 / self._seen))


def _credible(ratio: float) -> float:
    return min(10.0, max(0.1, ratio))
