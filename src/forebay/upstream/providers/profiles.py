"""The table: what is known of each provider. `docs/providers.md` is the same for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from forebay.errors import InvalidSetting
from forebay.interfaces import Charge
from forebay.upstream.providers.include_usage import with_include_usage
from forebay.upstream.providers.request import Endpoint, ProviderRequest, read_request
from forebay.upstream.providers.usage import Usage

_TYPICAL_OUTPUT: Final = 500  # tokens of an answer, where neither the request nor experience says


class TokenCounting(Enum):
    """How a provider counts tokens against its quotas of both kinds together."""

    LARGER = "larger"  # when let in: the larger of the output's bound and the estimated input; not given back
    SUM = "sum"  # when let in: the estimated input and the output's bound; not given back
    USED = "used"  # what is used, as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderProfile:
    """One row of the table.

    Attributes:
        provider: its name.
        protocol: how it is spoken to; None where that is not known.
        counting: how tokens count against a quota of both kinds together.
        cached_input_counts: whether what is read from a cache counts against a quota of input tokens.
        counting_is_free: whether counting tokens is outside of the quotas of those that are made.
        include_usage: whether ``stream_options.include_usage`` may be added to a stream that does not ask for it.
        bytes_per_token: of text.
        image_tokens: of an image.
    """

    provider: str
    protocol: str | None = "openai"
    token_counting: TokenCounting = TokenCounting.USED
    cached_input_counts: bool = True
    count_tokens_is_free: bool = False
    supports_include_usage: bool = False
    bytes_per_token: float = 4.0
    image_tokens: int = 765

    def read_request(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> ProviderRequest:
        """What a request asks for. Never fails: of garbage it knows that it is a request.

        Args:
            method: such as ``"POST"``.
            path: of the URL, with its query; a whole URL does too.
            headers: of the request.
            body: as it is sent.
        """
        return read_request(
            method, path, headers, body, bytes_per_token=self.bytes_per_token, image_tokens=self.image_tokens
        )

    def estimate_charge(
        self, request: ProviderRequest, *, output_tokens: int | None = None, input_ratio: float = 1.0
    ) -> Charge:
        """What a call is to reserve of the quotas before it is sent.

        Args:
            request: what it asks for.
            output_tokens: what such a call typically makes, if that is known.
            input_ratio: tokens that the account counts for each that was estimated (`InputTokenRatio`).
        """
        if request.endpoint is Endpoint.COUNT_TOKENS and self.count_tokens_is_free:
            return Charge(requests=0)
        sent = -int(-request.input_tokens * input_ratio // 1)
        if not request.generates_tokens:
            return Charge(input_tokens=sent, tokens=sent)
        bound = request.max_output_tokens
        made = output_tokens if output_tokens is not None else _TYPICAL_OUTPUT if bound is None else bound
        made = (made if bound is None else min(made, bound)) * request.choices
        return Charge(input_tokens=sent, output_tokens=made, tokens=self._together(request, sent, made))

    def _together(self, request: ProviderRequest, sent: int, made: int) -> int:
        bound = request.max_output_tokens
        if self.token_counting is TokenCounting.LARGER:
            return max(sent, bound or 0)
        if self.token_counting is TokenCounting.SUM and bound is not None:
            return sent + bound * request.choices
        return sent + made

    def final_charge(self, reserved: Charge, usage: Usage | None) -> Charge:
        """What a call was charged in the end; without usage, what was reserved for it."""
        if usage is None:
            return reserved
        sent = usage.input_tokens if self.cached_input_counts else usage.input_tokens - usage.cache_read_tokens
        sent = max(0, sent)
        return Charge(
            requests=reserved.requests,
            input_tokens=sent,
            output_tokens=usage.output_tokens,
            tokens=sent + usage.output_tokens if self.token_counting is TokenCounting.USED else reserved.tokens,
        )

    def with_include_usage(self, request: ProviderRequest, body: bytes) -> bytes | None:
        """The body of a request for a stream, so changed that the provider tells its usage; None: send it as it is.

        Its answer goes through a `UsageFilter` then, for the caller has not asked.
        """
        streams = (
            request.endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS) and request.stream and not request.include_usage
        )
        if not self.supports_include_usage or not streams or request.signed:
            return None
        if request.api_version is not None and request.api_version < _AZURE_USAGE_SINCE:
            return None
        return with_include_usage(body)


_AZURE_USAGE_SINCE: Final = "2024-09-01"  # api-version; older ones refuse what they do not know

_OPENAI: Final = ProviderProfile(provider="openai", token_counting=TokenCounting.LARGER, supports_include_usage=True)
_TABLE: Final = {
    row.provider: row
    for row in (
        # "Your rate limit is calculated as the maximum of max_tokens and the estimated number of tokens based on the
        # character count of your request": OpenAI, "Rate limits", error mitigation. Cached input counts.
        _OPENAI,
        # "Prompt text and count, the max_tokens setting, the best_of setting": Azure OpenAI, "Manage quota".
        ProviderProfile(provider="azure", token_counting=TokenCounting.SUM, supports_include_usage=True),
        # ITPM leaves cache reads out, OTPM counts what is made and not max_tokens, counting tokens has a limit of its
        # own: Anthropic, "Rate limits" and "Token counting". 3.5 characters to a token: its glossary.
        ProviderProfile(
            provider="anthropic",
            protocol="anthropic",
            cached_input_counts=False,
            count_tokens_is_free=True,
            bytes_per_token=3.5,
            image_tokens=1600,
        ),
        # Servers of one's own have no quotas; all three know stream_options. Sources: vLLM's OpenAI-compatible server,
        # Ollama's docs/openai, llama.cpp's tools/server (since pull request 16052 it tells usage only where asked).
        ProviderProfile(provider="vllm", supports_include_usage=True),
        ProviderProfile(provider="ollama", supports_include_usage=True),
        ProviderProfile(provider="llama.cpp", supports_include_usage=True),
        # Unknown servers: some refuse fields that they do not know, so nothing is added.
        ProviderProfile(provider="openai-compatible"),
        ProviderProfile(provider="generic", protocol=None),
    )
}


def profile_for(provider: str) -> ProviderProfile:
    """The row of a provider.

    Raises:
        InvalidSetting: there is none of that name.
    """
    row = _TABLE.get(provider.lower()) if isinstance(provider, str) else None
    if row is None:
        known = ", ".join(repr(name) for name in _TABLE)
        raise InvalidSetting(owner="Upstream", name="provider", value=provider, expected=f"one of {known}")
    return row
