"""LLM providers: requests, token counting, rate-limit headers, errors and usage. Unreadable input raises nothing."""

from forebay.upstream.providers.classify import (
    ErrorKind,
    classify,
    classify_stream_error,
    names_spend_cap,
)
from forebay.upstream.providers.credentials import CREDENTIAL_HEADERS, find_other_credential, normalize_credential
from forebay.upstream.providers.endpoints import Billing, Endpoint
from forebay.upstream.providers.event_stream import is_event_stream
from forebay.upstream.providers.http_headers import Headers
from forebay.upstream.providers.include_usage import UsageFilter
from forebay.upstream.providers.metering import find_unpriced, find_unreadable
from forebay.upstream.providers.profiles import ProviderProfile, TokenCounting, profile_for
from forebay.upstream.providers.rate_limit_headers import (
    read_rate_limits,
    read_rate_scope,
    read_retry_after,
    read_should_retry,
)
from forebay.upstream.providers.request import ProviderRequest
from forebay.upstream.providers.rewrite import depends_on_stored_state, path_with_model, with_model
from forebay.upstream.providers.usage import Usage
from forebay.upstream.providers.usage_meter import BodyMeter, UsageMeter, WholeResponse, read_response

__all__ = [
    "CREDENTIAL_HEADERS",
    "Billing",
    "BodyMeter",
    "Endpoint",
    "ErrorKind",
    "Headers",
    "ProviderProfile",
    "ProviderRequest",
    "TokenCounting",
    "Usage",
    "UsageFilter",
    "UsageMeter",
    "WholeResponse",
    "classify",
    "classify_stream_error",
    "depends_on_stored_state",
    "find_other_credential",
    "find_unpriced",
    "find_unreadable",
    "is_event_stream",
    "names_spend_cap",
    "normalize_credential",
    "path_with_model",
    "profile_for",
    "read_rate_limits",
    "read_rate_scope",
    "read_response",
    "read_retry_after",
    "read_should_retry",
    "with_model",
]
