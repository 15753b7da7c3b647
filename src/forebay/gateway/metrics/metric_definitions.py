"""The metrics of a gateway: names, types, labels and units. `docs/gateway.md` has them as a table.

Those whose names begin with ``gen_ai_`` are OpenTelemetry's, as its rules translate their names for Prometheus. Source:
"Semantic conventions for generative AI metrics", and "Prometheus and OpenMetrics Compatibility". Their buckets are the
ones recommended there, continued to the ten minutes that a call may take.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Across = Literal["sum", "highest", "lowest", "worst state"]

DURATION_BUCKETS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_OTEL_DURATION_BUCKETS: Final = tuple(0.01 * 2**power for power in range(17))  # to 655 seconds
_OTEL_TOKEN_BUCKETS: Final = tuple(float(4**power) for power in range(14))

_PROVIDER: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class MetricDefinition(NamedTuple):
    """One metric.

    Attributes:
        name: as Prometheus has it; that of a counter ends in ``_total``.
        kind: its type.
        labels: in their order.
        unit: of its values, in the plural; empty if it has none.
        text: what it counts or measures, as its HELP.
        buckets: upper bounds of a histogram, in its unit.
        across: how the values of a gateway's workers make one: where all know the same, the latest that any knows.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    text: str
    buckets: tuple[float, ...] = ()
    across: Across = "sum"


REQUESTS: Final = MetricDefinition(
    "forebay_gateway_requests_total", "counter", ("target", "status"), "requests", "Responses given, by HTTP status."
)
REQUEST_DURATION: Final = MetricDefinition(
    "forebay_gateway_request_duration_seconds",
    "histogram",
    ("target", "model", "status"),
    "seconds",
    "From a request to the end of its response, waits included.",
    DURATION_BUCKETS,
)
WAIT: Final = MetricDefinition(
    "forebay_gateway_wait_seconds",
    "histogram",
    ("target", "model", "status"),
    "seconds",
    "Time that a call waited here for its permits: in queues, and before its retries.",
    DURATION_BUCKETS,
)
REJECTIONS: Final = MetricDefinition(
    "forebay_gateway_rejections_total",
    "counter",
    ("target", "limited_by"),
    "calls",
    "Calls rejected here, by the limit that rejected them.",
)
FALLBACKS: Final = MetricDefinition(
    "forebay_fallbacks_total",
    "counter",
    ("target", "fallback_target"),
    "calls",
    "Calls for a target that a fallback served.",
)
ATTEMPTS: Final = MetricDefinition(
    "forebay_attempts_total",
    "counter",
    ("target", "model", "outcome"),
    "attempts",
    "Attempts of calls that have ended, by outcome.",
)
RETRIES: Final = MetricDefinition(
    "forebay_retries_total", "counter", ("target", "model"), "attempts", "Attempts that were retries."
)
TIME_TO_FIRST_TOKEN: Final = MetricDefinition(
    "forebay_time_to_first_token_seconds",
    "histogram",
    ("target", "model"),
    "seconds",
    "From sending a call to the first output of its streaming answer, reasoning left out.",
    DURATION_BUCKETS,
)
TOKENS: Final = MetricDefinition(
    "forebay_tokens_total",
    "counter",
    ("target", "model", "tenant", "key", "api_key", "direction", "kind"),
    "tokens",
    "LLM tokens used.",
)
SPEND: Final = MetricDefinition(
    "forebay_spend_usd_total",
    "counter",
    ("target", "model", "tenant", "key", "api_key"),
    "US dollars",
    "US dollars that calls have cost, by the price list.",
)
BUDGET_ALERTS: Final = MetricDefinition(
    "forebay_budget_alerts_total",
    "counter",
    ("target", "budget", "share"),
    "alerts",
    "Budgets of which a share was spent, once each a period.",
)
OPERATION_DURATION: Final = MetricDefinition(
    "gen_ai_client_operation_duration_seconds",
    "histogram",
    ("target", *_PROVIDER, "error_type"),
    "seconds",
    "Duration of one attempt at the provider, to the end of its answer.",
    _OTEL_DURATION_BUCKETS,
)
TIME_TO_FIRST_CHUNK: Final = MetricDefinition(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    "histogram",
    ("target", *_PROVIDER),
    "seconds",
    "From sending a call to the first bytes of its streaming answer.",
    _OTEL_DURATION_BUCKETS,
)
TOKEN_USAGE: Final = MetricDefinition(
    "gen_ai_client_token_usage",
    "histogram",
    ("target", *_PROVIDER, "gen_ai_token_type"),
    "tokens",
    "Number of input and output tokens used, by call.",
    _OTEL_TOKEN_BUCKETS,
)

_ACCOUNT: Final = ("target", "account")
_QUOTA: Final = (*_ACCOUNT, "quota", "source")
IN_FLIGHT: Final = MetricDefinition("forebay_calls_in_flight", "gauge", _ACCOUNT, "calls", "Calls in flight.")
LIMIT: Final = MetricDefinition(
    "forebay_calls_limit", "gauge", _ACCOUNT, "calls", "Calls that may be in flight.", across="highest"
)
QUEUED: Final = MetricDefinition("forebay_calls_queued", "gauge", _ACCOUNT, "calls", "Calls in the queue.")
LOAD: Final = MetricDefinition(
    "forebay_account_load_ratio",
    "gauge",
    _ACCOUNT,
    "ratio",
    "Expected wait of the next call over the longest allowed.",
    across="highest",
)
BREAKER: Final = MetricDefinition(
    "forebay_breaker_state",
    "gauge",
    (*_ACCOUNT, "state"),
    "",
    "1 for the state of a breaker, 0 for the others.",
    across="worst state",
)
QUOTA_REQUESTS_REMAINING: Final = MetricDefinition(
    "forebay_quota_remaining_requests",
    "gauge",
    _QUOTA,
    "requests",
    "Requests that remain of a quota.",
    across="lowest",
)
QUOTA_REQUESTS_LIMIT: Final = MetricDefinition(
    "forebay_quota_limit_requests",
    "gauge",
    _QUOTA,
    "requests",
    "Requests that a quota grants.",
    across="highest",
)
QUOTA_TOKENS_REMAINING: Final = MetricDefinition(
    "forebay_quota_remaining_tokens",
    "gauge",
    _QUOTA,
    "tokens",
    "Tokens that remain of a quota.",
    across="lowest",
)
QUOTA_TOKENS_LIMIT: Final = MetricDefinition(
    "forebay_quota_limit_tokens",
    "gauge",
    _QUOTA,
    "tokens",
    "Tokens that a quota grants.",
    across="highest",
)
ACCOUNTS: Final = MetricDefinition("forebay_accounts", "gauge", ("target",), "accounts", "Accounts in memory.")
UNPRICED: Final = MetricDefinition(
    "forebay_unpriced_calls_total", "counter", ("target",), "calls", "Calls under a budget whose price was not known."
)
BUDGET_LIMIT: Final = MetricDefinition(
    "forebay_budget_limit_usd",
    "gauge",
    ("target",),
    "US dollars",
    "Budget of a target for each period.",
    across="highest",
)
BUDGET_SPENT: Final = MetricDefinition(
    "forebay_budget_spent_usd",
    "gauge",
    ("target",),
    "US dollars",
    "Dollars of the budget spent in this period.",
    across="highest",
)
BUDGET_RESERVED: Final = MetricDefinition(
    "forebay_budget_reserved_usd", "gauge", ("target",), "US dollars", "Dollars of the budget held for calls under way."
)
BUDGET_USED: Final = MetricDefinition(
    "forebay_budget_used_ratio",
    "gauge",
    ("target",),
    "ratio",
    "Share of the budget spent in this period.",
    across="highest",
)
WORKERS: Final = MetricDefinition(
    "forebay_gateway_workers",
    "gauge",
    ("state",),
    "workers",
    "Worker processes, by whether they answered when their metrics were collected.",
)
WORKER_RESTARTS: Final = MetricDefinition(
    "forebay_gateway_worker_restarts_total", "counter", (), "restarts", "Workers that died and were started again."
)
BUILD: Final = MetricDefinition(
    "forebay_build_info", "gauge", ("version",), "", "1, with the version of Forebay.", across="highest"
)

METRICS: Final = (
    *(REQUESTS, REQUEST_DURATION, WAIT, REJECTIONS, FALLBACKS, ATTEMPTS, RETRIES, TIME_TO_FIRST_TOKEN, TOKENS, SPEND),
    BUDGET_ALERTS,
    *(OPERATION_DURATION, TIME_TO_FIRST_CHUNK, TOKEN_USAGE),
    *(IN_FLIGHT, LIMIT, QUEUED, LOAD, BREAKER),
    *(QUOTA_REQUESTS_REMAINING, QUOTA_REQUESTS_LIMIT, QUOTA_TOKENS_REMAINING, QUOTA_TOKENS_LIMIT),
    *(ACCOUNTS, UNPRICED, BUDGET_LIMIT, BUDGET_SPENT, BUDGET_RESERVED, BUDGET_USED),
    *(WORKERS, WORKER_RESTARTS, BUILD),
)
"""All of them, in the order of the page."""
