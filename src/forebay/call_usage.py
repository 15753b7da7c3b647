"""CallUsage: what calls of upstreams have used, of one call or of many added up."""

from __future__ import annotations

from typing import Final

from forebay._json import JsonStruct


class CallUsage(JsonStruct, frozen=True, kw_only=True, omit_defaults=True):
    """The usage of calls through upstreams: of one call, or of many added up by ``+``.

    Attributes:
        calls: calls that their provider served, or may have billed. Attempts that it refused (429, 400, 500) are not
            counted, nor are calls that were not sent.
        input_tokens: sent, with those that were cached.
        output_tokens: received, with hidden reasoning.
        cached_input_tokens: those of the input that the provider read from its cache.
        cache_write_tokens: those of the input that it wrote to its cache.
        reasoning_tokens: those of the output that were hidden reasoning, where the provider reports them.
        usd: US dollars, of the calls whose price is known.
        unreported: those of the calls whose provider reported no usage, as when they were cut off: they count as was
            expected of them, or by the output that arrived.
        unpriced: those of the calls that have no known price: they count as 0 dollars.
        unfinished: calls that had not ended when this was added up, as where their task timed out. They are in none of
            the other figures.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    usd: float = 0.0
    unreported: int = 0
    unpriced: int = 0
    unfinished: int = 0

    def __bool__(self) -> bool:
        """Return whether there was any call."""
        return self != NO_USAGE

    def __add__(self, other: CallUsage) -> CallUsage:
        """Return the usage of both together."""
        return CallUsage(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_input_tokens=self.cached_input_tokens + other.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            usd=self.usd + other.usd,
            unreported=self.unreported + other.unreported,
            unpriced=self.unpriced + other.unpriced,
            unfinished=self.unfinished + other.unfinished,
        )

    def __sub__(self, other: CallUsage) -> CallUsage:
        """Return what this has used more than `other`."""
        return CallUsage(**{name: getattr(self, name) - getattr(other, name) for name in self.__struct_fields__})


NO_USAGE: Final = CallUsage()
"""The usage of no calls."""

CALL_BEGINS: Final = CallUsage(unfinished=1)
"""The change when a call begins; `CALL_ENDS` takes it back."""

CALL_ENDS: Final = CallUsage(unfinished=-1)
"""The change when a call ends, besides its usage."""
