"""The usage of a call: its tokens, and whatever else is billed, as the provider counted them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from forebay.quota import BilledUsage

_MAX_TOKENS: Final = 10**8  # of one call: ten times the largest context window of any model
_MAX_SEARCHES: Final = 10_000  # of one call
_EXTRAS: Final = frozenset(
    {"cache_creation", "server_tool_use", "service_tier", "speed", "inference_geo", "iterations"}
)  # read by `_with_extras`
_NUMBER: Final = (int, float)  # `int | float` would be built at each check

US_FACTOR: Final = 1.1
"""By which Anthropic's calls are dearer that are computed in the US only: "Pricing", data residency."""


class Usage(BilledUsage, frozen=True, kw_only=True):
    """The usage of one call: the units that its provider bills, and whether it reported them.

    Attributes:
        estimated: True if some of it is an estimate, since the provider did not report it.
    """

    estimated: bool = False

    def billed(self, *, tier: str = "", web_searches: int = 0) -> BilledUsage:
        """Return the units that the provider bills.

        Args:
            tier: what the request asked for; counts if the answer does not report it.
            web_searches: those that every such call makes, and that no answer reports.
        """
        if (not tier or self.tier) and web_searches <= self.web_searches:
            return self
        return msgspec.structs.replace(self, tier=self.tier or tier, web_searches=max(web_searches, self.web_searches))


def _is_impossible(value: object) -> bool:
    """Return whether the value is a number that cannot count the tokens of a call."""
    return value is not None and isinstance(value, _NUMBER) and not 0 <= value <= _MAX_TOKENS


def read_token_count(value: object) -> int:
    """Return a number of tokens from JSON; 0 if it is not one."""
    if value is None:
        return 0
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _NUMBER)):
        return 0
    return int(value) if 0 <= value <= _MAX_TOKENS else 0


def read_usage(value: Any, known: Usage | None = None) -> Usage | None:
    """Return the usage in a ``usage`` object of any provider; None if it is not one, or has an impossible number.

    OpenAI counts cached tokens within ``prompt_tokens`` or ``input_tokens``. Anthropic counts them outside of
    ``input_tokens``, in two fields of its own, by which its objects are recognized. Sources: the references of both,
    and the types of their SDKs (``CompletionUsage``, ``ResponseUsage``, ``Usage``, ``MessageDeltaUsage``); DeepSeek's
    ``prompt_cache_hit_tokens``. Some count hidden reasoning in ``total_tokens`` alone (xAI, Gemini): what is more there
    than the input is output.

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
    if _is_impossible(prompt) or _is_impossible(output) or _is_impossible(cache_read) or _is_impossible(cache_write):
        return None  # one wrong report must not spend a month's budget: the reserved amount counts
    output_tokens = read_token_count(output)
    if known is not None:
        output_tokens = max(output_tokens, known.output_tokens)
    kept = {} if known is None else msgspec.structs.asdict(known)
    if not isinstance(prompt, _NUMBER):
        cached, written = (known.cached_input_tokens, known.cache_write_tokens) if known else (0, 0)
        input_tokens = known.input_tokens if known else 0
    elif isinstance(cache_read, _NUMBER) or isinstance(cache_write, _NUMBER):
        cached, written = read_token_count(cache_read), read_token_count(cache_write)
        input_tokens = read_token_count(prompt) + cached + written
    elif known is not None and (known.cached_input_tokens or known.cache_write_tokens):
        cached, written = known.cached_input_tokens, known.cache_write_tokens
        input_tokens = max(read_token_count(prompt), known.input_tokens)  # a later event leaves the cache out
    else:
        input_tokens = read_token_count(prompt)
        details = value.get("prompt_tokens_details", value.get("input_tokens_details"))
        if isinstance(details, dict):
            cached = min(read_token_count(details.get("cached_tokens")), input_tokens)
            written = min(read_token_count(details.get("cache_write_tokens")), input_tokens - cached)
            kept |= _read_parts(details, "input", input_tokens)
        else:
            cached, written = min(read_token_count(value.get("prompt_cache_hit_tokens")), input_tokens), 0
    hidden = max(0, read_token_count(value.get("total_tokens")) - input_tokens - output_tokens)
    output_tokens += hidden
    kept["reasoning_tokens"] = max(hidden, kept.get("reasoning_tokens", 0))
    outputs = value.get("completion_tokens_details", value.get("output_tokens_details"))
    if isinstance(outputs, dict):
        kept |= _read_parts(outputs, "output", output_tokens)
    kept |= {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cached_input_tokens": cached,
        "cache_write_tokens": written,
    }
    return _with_extras(Usage(**kept), value)


def _read_parts(details: dict[str, Any], direction: str, tokens: int) -> dict[str, int]:
    """Return the tokens of sound, of images and of reasoning in OpenAI's details, which are parts of all `tokens`."""
    audio = min(read_token_count(details.get("audio_tokens")), tokens)
    image = min(read_token_count(details.get("image_tokens")), tokens - audio)
    parts = {f"{direction}_audio_tokens": audio, f"{direction}_image_tokens": image} if audio or image else {}
    if reasoning := min(read_token_count(details.get("reasoning_tokens")), tokens):
        parts["reasoning_tokens"] = reasoning
    return parts


def _read_tier(value: dict[str, Any]) -> str | None:
    """Return the tier in Anthropic's usage by which calls have other prices; its priority tier is paid in advance."""
    if value.get("service_tier") == "batch":
        return "batch"
    return "fast" if value.get("speed") == "fast" else None


def _with_extras(usage: Usage, value: dict[str, Any]) -> Usage:
    """Return a usage with the rest of what Anthropic reports in the same object."""
    if _EXTRAS.isdisjoint(value):
        return usage
    extras: dict[str, Any] = {}
    creation = value.get("cache_creation")
    if isinstance(creation, dict) and (long := read_token_count(creation.get("ephemeral_1h_input_tokens"))):
        extras["cache_write_1h_tokens"] = min(long, usage.cache_write_tokens)
    tools = value.get("server_tool_use")
    if isinstance(tools, dict) and (searches := read_token_count(tools.get("web_search_requests"))):
        extras["web_searches"] = min(_MAX_SEARCHES, searches)
    if (tier := _read_tier(value)) is not None:
        extras["tier"] = tier
    if value.get("inference_geo") == "us":
        extras["factor"] = US_FACTOR
    iterations = value.get("iterations")
    if isinstance(iterations, list):  # a compaction is not part of the totals
        compactions = [each for each in iterations if isinstance(each, dict) and each.get("type") == "compaction"]
        for each in filter(None, map(read_usage, compactions)):
            extras["input_tokens"] = extras.get("input_tokens", usage.input_tokens) + each.input_tokens
            extras["output_tokens"] = extras.get("output_tokens", usage.output_tokens) + each.output_tokens
    return msgspec.structs.replace(usage, **extras) if extras else usage
