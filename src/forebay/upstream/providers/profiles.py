"""A profile of each known provider: its protocol, and how it counts tokens. `docs/providers.md` has the same table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final

import msgspec

from forebay.errors import InvalidSetting
from forebay.interfaces import Charge
from forebay.quota import BilledUsage
from forebay.upstream.providers.credentials import read_credential
from forebay.upstream.providers.endpoints import Billing, Endpoint, find_rule
from forebay.upstream.providers.include_usage import with_include_usage
from forebay.upstream.providers.metering import expected_searches, find_unseen_input
from forebay.upstream.providers.request import ProviderRequest, read_request
from forebay.upstream.providers.usage import US_FACTOR, Usage

_TYPICAL_OUTPUT: Final = 500  # tokens, where neither the request nor earlier calls give a number
_UNBOUNDED_OUTPUT: Final = 16_384  # tokens, in dollars: as much as many models can make
_STORED_INPUT: Final = 50_000  # tokens of a file, conversation or response whose length is not known
_IMAGE_OUTPUT: Final = 10_000  # tokens of an image; those of high quality take up to 6,240
_OPENAI_ENDPOINTS: Final = frozenset(
    {Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.EMBEDDINGS, Endpoint.IMAGES, Endpoint.SPEECH}
)
_AZURE_USAGE_SINCE: Final = "2024-09-01"  # api-version; older ones reject unknown fields


class TokenCounting(Enum):
    """The way in which a provider charges a quota of input and output tokens together."""

    LARGER = "larger"  # on admission: the larger of the output bound and the estimated input; nothing is returned
    SUM = "sum"  # on admission: the estimated input and the output bound; nothing is returned
    USED = "used"  # as the tokens are used


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderProfile:
    """The profile of one provider.

    Attributes:
        provider: its name.
        protocol: ``"openai"`` or ``"anthropic"``; None if unknown.
        token_counting: how a quota of input and output tokens together is charged.
        cached_input_counts: whether tokens read from a cache count against a quota of input tokens.
        count_tokens_is_free: whether requests that count tokens take nothing from the other quotas.
        supports_include_usage: whether ``stream_options.include_usage`` may be added to a stream that lacks it.
        bytes_per_token: of text, for estimates.
        image_tokens: of an image, for estimates.
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
        """Read a request. Never raises: one that is unreadable counts as a request and nothing more.

        Args:
            method: such as ``"POST"``.
            path: of the URL, with its query; a whole URL does too.
            headers: of the request.
            body: as it is sent.
        """
        return read_request(
            method, path, headers, body, bytes_per_token=self.bytes_per_token, image_tokens=self.image_tokens
        )

    def read_credential(self, request: ProviderRequest, headers: Mapping[str, str]) -> str:
        """Return the header that the provider takes the API key of a request from; empty if there is none.

        Anthropic serves OpenAI's chat completions too, and reads their header there.
        """
        openai = self.provider == "anthropic" and request.endpoint in _OPENAI_ENDPOINTS
        return read_credential(headers, provider="" if openai else self.provider)

    def auth_header(self, path: str, key: str) -> tuple[str, str]:
        """Return the name and the value of the header in which the provider takes an API key.

        Args:
            path: of the request; Anthropic reads another header for OpenAI's chat completions.
            key: without ``Bearer``.
        """
        if self.provider == "azure":
            return "api-key", key
        if self.provider == "anthropic" and not _is_openai_endpoint(path):
            return "x-api-key", key
        return "authorization", f"Bearer {key}"

    def estimate_charge(
        self, request: ProviderRequest, *, output_tokens: int | None = None, input_ratio: float = 1.0
    ) -> Charge:
        """Return the charge to reserve from the quotas before a call is sent.

        Args:
            request: the call.
            output_tokens: typical of such a call, or None if unknown.
            input_ratio: charged over estimated input tokens of the account (see `TokenEstimates`).
        """
        if request.endpoint is Endpoint.COUNT_TOKENS and self.count_tokens_is_free:
            return Charge(requests=0)
        sent = -int(-request.input_tokens * input_ratio // 1)
        if not request.generates_tokens:
            return Charge(input_tokens=sent, tokens=sent)
        bound = request.max_output_tokens
        received = output_tokens if output_tokens is not None else _TYPICAL_OUTPUT if bound is None else bound
        received = (received if bound is None else min(received, bound)) * request.choices
        return Charge(input_tokens=sent, output_tokens=received, tokens=self._combined(request, sent, received))

    def estimate_usage(
        self,
        request: ProviderRequest,
        *,
        largest_output: float = 0.0,
        input_ratio: float = 1.0,
        continued_tokens: int | None = None,
    ) -> BilledUsage:
        """Return the usage whose price to reserve before a call is sent: the most that it may use, if it says so.

        Args:
            request: the call.
            largest_output: tokens of the largest output lately, for a request that has no bound.
            input_ratio: as for `estimate_charge`; only one that raises the estimate counts.
            continued_tokens: of the stored response that it continues; None if that is not known.
        """
        if request.billing is Billing.CHARACTERS:
            return BilledUsage(characters=request.characters)
        unseen = find_unseen_input(request)
        sent = -int(-request.input_tokens * max(1.0, input_ratio) // 1) + _STORED_INPUT * unseen.stored
        if request.previous_response_id is not None:
            sent += _STORED_INPUT if continued_tokens is None else continued_tokens
        if request.endpoint is Endpoint.IMAGES:
            images = _IMAGE_OUTPUT * request.choices
            return BilledUsage(input_tokens=sent, output_tokens=images, output_image_tokens=images, tier=request.tier)
        if not request.generates_tokens:
            return BilledUsage(input_tokens=sent, tier=request.tier)
        bound = request.max_output_tokens
        received = (max(_UNBOUNDED_OUTPUT, int(largest_output)) if bound is None else bound) * request.choices
        return BilledUsage(
            input_tokens=sent,
            output_tokens=received,
            input_audio_tokens=sent if unseen.audio else 0,
            output_audio_tokens=received if unseen.audio else 0,
            web_searches=expected_searches(request),
            tier=request.tier,
            factor=US_FACTOR if request.regional else 1.0,
        )

    def charge_at_most(
        self,
        expected: Charge,
        request: ProviderRequest,
        *,
        input_ratio: float = 1.0,
        continued_tokens: int | None = None,
    ) -> Charge:
        """Return the charge of a call with the most that it may use besides, for strict quotas.

        Of input there is only an estimate, the same as for its price. See `estimate_usage` for the arguments.
        """
        usage = self.estimate_usage(request, input_ratio=input_ratio, continued_tokens=continued_tokens)
        return msgspec.structs.replace(
            expected, most_output_tokens=usage.output_tokens, most_tokens=usage.input_tokens + usage.output_tokens
        )

    def _combined(self, request: ProviderRequest, sent: int, received: int) -> int:
        """Return the charge on a quota of input and output tokens together."""
        bound = request.max_output_tokens
        if self.token_counting is TokenCounting.LARGER:
            return max(sent, bound or 0)
        if self.token_counting is TokenCounting.SUM and bound is not None:
            return sent + bound * request.choices
        return sent + received

    def final_charge(self, reserved: Charge, usage: Usage | None, *, arrived: int | None = None) -> Charge:
        """Return the charge of a call that has ended: by its usage, or as it was reserved if the usage is unknown.

        Args:
            reserved: before it was sent.
            usage: of the call.
            arrived: the output that has arrived, of a usage that adds a guess of what has not. A guess makes no debt:
                only strict quotas count it beyond what was reserved.
        """
        if usage is None:
            return reserved
        output = usage.output_tokens
        if arrived is not None:
            output = max(arrived, min(output, reserved.output_tokens))
        sent = usage.input_tokens if self.cached_input_counts else usage.input_tokens - usage.cached_input_tokens
        sent = max(0, sent)
        tokens = sent + output if self.token_counting is TokenCounting.USED else reserved.tokens
        most, most_output = sent + usage.output_tokens, usage.output_tokens
        return Charge(
            requests=reserved.requests,
            input_tokens=sent,
            output_tokens=output,
            tokens=tokens,
            most_output_tokens=most_output if most_output > output else 0,
            most_tokens=most if most > tokens else 0,
        )

    def with_include_usage(self, request: ProviderRequest, body: bytes) -> bytes | None:
        """Return the body of a stream request, changed to ask for its usage; None if it is to be sent unchanged.

        The response to a changed body goes through a `UsageFilter`, since the caller did not ask for its usage.
        """
        if not self.supports_include_usage or not request.stream or request.include_usage or request.signed:
            return None
        if request.endpoint not in (Endpoint.CHAT, Endpoint.COMPLETIONS):
            return None
        if request.api_version is not None and request.api_version < _AZURE_USAGE_SINCE:
            return None
        return with_include_usage(body)


_OPENAI: Final = ProviderProfile(provider="openai", token_counting=TokenCounting.LARGER, supports_include_usage=True)
_PROFILES: Final = {
    profile.provider: profile
    for profile in (
        # "Your rate limit is calculated as the maximum of max_tokens and the estimated number of tokens based on the
        # character count of your request": OpenAI, "Rate limits", error mitigation. Cached input counts.
        _OPENAI,
        # "Prompt text and count, the max_tokens setting, the best_of setting": Azure OpenAI, "Manage quota".
        ProviderProfile(provider="azure", token_counting=TokenCounting.SUM, supports_include_usage=True),
        # ITPM leaves cache reads out, OTPM counts generated tokens and not max_tokens, counting tokens has its own
        # limit: Anthropic, "Rate limits" and "Token counting". 3.5 characters to a token: its glossary.
        ProviderProfile(
            provider="anthropic",
            protocol="anthropic",
            cached_input_counts=False,
            count_tokens_is_free=True,
            bytes_per_token=3.5,
            image_tokens=1600,
        ),
        # Self-hosted servers have no quotas; all three know stream_options. Sources: vLLM's OpenAI-compatible server,
        # Ollama's docs/openai, llama.cpp's tools/server (since pull request 16052 it reports usage only on request).
        ProviderProfile(provider="vllm", supports_include_usage=True),
        ProviderProfile(provider="ollama", supports_include_usage=True),
        ProviderProfile(provider="llama.cpp", supports_include_usage=True),
        # Unknown servers: some reject unknown fields, so nothing is added.
        ProviderProfile(provider="openai-compatible"),
        ProviderProfile(provider="generic", protocol=None),
    )
}


@lru_cache(maxsize=256)  # calls go to a few paths
def _is_openai_endpoint(path: str) -> bool:
    return find_rule(path.partition("?")[0]).endpoint in _OPENAI_ENDPOINTS


def profile_for(provider: str) -> ProviderProfile:
    """Return the profile of a provider, by its name in any case.

    Raises:
        InvalidSetting: the name is unknown.
    """
    profile = _PROFILES.get(provider.lower()) if isinstance(provider, str) else None
    if profile is None:
        known = ", ".join(repr(name) for name in _PROFILES)
        raise InvalidSetting(owner="Upstream", name="provider", value=provider, expected=f"one of {known}")
    return profile
