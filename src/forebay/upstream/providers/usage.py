"""The usage of a call: its tokens, as the provider counted them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

_MAX_TOKENS: Final = 10**8  # of one call: ten times the largest context window of any model
_NUMBER: Final = (int, float)  # `int | float` would be built at each check


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one call.

    Attributes:
        input_tokens: sent, with those that came from a cache.
        output_tokens: received, with hidden reasoning.
        cache_read_tokens: the part of the input that was read from a cache.
        cache_write_tokens: the part of the input that was written to a cache.
        estimated: whether some of it is an estimate, since the provider did not report it.
    """

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    estimated: bool = False


def _is_impossible(value: object) -> bool:
    """Return whether the value is a number that cannot count the tokens of a call."""
    return isinstance(value, _NUMBER) and not 0 <= value <= _MAX_TOKENS


def read_token_count(value: object) -> int:
    """Return a number of tokens from JSON; 0 if it is not one."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _NUMBER)):
        return 0
    return int(value) if 0 <= value <= _MAX_TOKENS else 0


def read_usage(value: Any, known: Usage | None = None) -> Usage | None:
    """Return the usage in a ``usage`` object of any provider; None if it is not one, or has an impossible number.

    OpenAI counts cached tokens within ``prompt_tokens`` or ``input_tokens``. Anthropic counts them outside of
    ``input_tokens``, in two fields of its own, by which its objects are recognized. Sources: the references of both,
    and the types of their SDKs (``CompletionUsage``, ``ResponseUsage``, ``Usage``, ``MessageDeltaUsage``); DeepSeek's
    ``prompt_cache_hit_tokens``.

    Args:
        value: from the JSON.
        known: from an earlier event of the same response; fields missing in `value` are kept. Both are totals.
    """
    if not isinstance(value, dict):
        return None
    cache_read, cache_write = value.get("cache_read_input_tokens"), value.get("cache_creation_input_tokens")
    output = value.get("completion_tokens", value.get("output_tokens"))
    prompt = value.get("prompt_tokens", value.get("input_tokens"))
    if not isinstance(prompt, _NUMBER) and not isinstance(output, _NUMBER):
        return None
    if any(map(_is_impossible, (prompt, output, cache_read, cache_write))):
        return None  # one wrong report must not spend a month's budget: the reserved amount counts
    output_tokens = read_token_count(output)
    if known is not None:
        output_tokens = max(output_tokens, known.output_tokens)
    if not isinstance(prompt, _NUMBER):
        cached, written = (known.cache_read_tokens, known.cache_write_tokens) if known else (0, 0)
        input_tokens = known.input_tokens if known else 0
    elif isinstance(cache_read, _NUMBER) or isinstance(cache_write, _NUMBER):
        cached, written = read_token_count(cache_read), read_token_count(cache_write)
        input_tokens = read_token_count(prompt) + cached + written
    elif known is not None and (known.cache_read_tokens or known.cache_write_tokens):
        cached, written = known.cache_read_tokens, known.cache_write_tokens
        input_tokens = max(read_token_count(prompt), known.input_tokens)  # a later event leaves the cache out
    else:
        details = value.get("prompt_tokens_details", value.get("input_tokens_details"))
        hit = details.get("cached_tokens") if isinstance(details, dict) else value.get("prompt_cache_hit_tokens")
        input_tokens = read_token_count(prompt)
        cached, written = min(read_token_count(hit), input_tokens), 0
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=cached,
        cache_write_tokens=written,
    )
