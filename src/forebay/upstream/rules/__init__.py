"""What is known of providers: how they are asked, how they count, and how they say no. Garbage makes nothing fail."""

from forebay.upstream.rules.headers import notices, retry_after, wants_retry
from forebay.upstream.rules.include_usage import UsageFilter
from forebay.upstream.rules.meaning import Meaning, meaning_in_stream, meaning_of
from forebay.upstream.rules.meter import Meter, read_whole
from forebay.upstream.rules.other_model import leans_on_its_provider, path_with_model, with_model
from forebay.upstream.rules.plain import Plain
from forebay.upstream.rules.request import Request, Route
from forebay.upstream.rules.table import Counting, Rules, rules_for
from forebay.upstream.rules.usage import InputRatio, Usage

__all__ = [
    "Counting",
    "InputRatio",
    "Meaning",
    "Meter",
    "Plain",
    "Request",
    "Route",
    "Rules",
    "Usage",
    "UsageFilter",
    "leans_on_its_provider",
    "meaning_in_stream",
    "meaning_of",
    "notices",
    "path_with_model",
    "read_whole",
    "retry_after",
    "rules_for",
    "wants_retry",
    "with_model",
]
