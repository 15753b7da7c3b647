"""Metrics of the gateway, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import choose_encoder

from forebay import __version__
from forebay.events import BudgetAlert
from forebay.gateway.call_record import CallRecord
from forebay.gateway.metrics import metric_definitions as definitions
from forebay.gateway.metrics.account_collector import AccountCollector
from forebay.gateway.metrics.bounded_label import BoundedLabel
from forebay.gateway.metrics.metric_definitions import MetricDefinition
from forebay.gateway.metrics.metric_snapshot import MetricSnapshot, SnapshotCollector, take_snapshot
from forebay.gateway.metrics.usage_collector import UsageCollector
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.targets.targets import Target
from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallOutcome
from forebay.upstream.providers import Endpoint, Usage

_OUTCOMES: Final = {
    Outcome.SUCCESS: "succeeded",
    Outcome.OVERLOAD: "throttled",
    Outcome.FAULT: "failed",
    Outcome.IGNORED: "ignored",
}
_OPERATIONS: Final = {  # OpenTelemetry's values of gen_ai.operation.name; other endpoints have names of ours
    Endpoint.CHAT: "chat",
    Endpoint.MESSAGES: "chat",
    Endpoint.RESPONSES: "chat",
    Endpoint.COMPLETIONS: "text_completion",
}
_PROVIDERS: Final = {"azure": "azure.ai.openai"}  # its values of gen_ai.provider.name, where ours is another
_COUNTED: Final = (
    *(definitions.REQUESTS, definitions.REQUEST_DURATION, definitions.WAIT, definitions.REJECTIONS),
    *(definitions.FALLBACKS, definitions.ATTEMPTS, definitions.RETRIES, definitions.TIME_TO_FIRST_TOKEN),
    *(definitions.OPERATION_DURATION, definitions.TIME_TO_FIRST_CHUNK, definitions.TOKEN_USAGE),
    definitions.BUDGET_ALERTS,
)


class Operation(NamedTuple):
    """The provider's side of a call: what attempts at it have in common.

    Attributes:
        target: that they are sent to.
        provider: whose API it is.
        endpoint: of the API.
        model: that they ask for.
    """

    target: str
    provider: str
    endpoint: Endpoint
    model: str


class GatewayMetrics:
    """The counters and histograms of one gateway, and gauges that are read from its upstreams at each scrape.

    Args:
        targets: of the gateway.
        settings: how many values its labels have at most.
    """

    def __init__(self, targets: Sequence[Target], settings: GatewaySettings) -> None:
        self._registry = CollectorRegistry()
        self._models = BoundedLabel(settings.max_metrics_models)
        self._metrics = {definition.name: _new_metric(definition, self._registry) for definition in _COUNTED}
        self._children: dict[tuple[str, ...], Any] = {}
        # What each call records, by one key, since to find its series one by one took longer than to count. As bounded
        # as the series.
        self._of_calls: dict[tuple[str, str, int], tuple[Any, Any, Any]] = {}
        self._of_attempts: dict[tuple[str, str, Endpoint, str, str, str], tuple[Any, Any]] = {}
        self._of_tokens: dict[tuple[str, str, Endpoint, str], tuple[Any, Any]] = {}
        build = Gauge(definitions.BUILD.name, definitions.BUILD.text, definitions.BUILD.labels, registry=self._registry)
        build.labels(__version__).set(1)
        workers = Gauge(
            definitions.WORKERS.name, definitions.WORKERS.text, definitions.WORKERS.labels, registry=self._registry
        )
        workers.labels("answered").set(1)  # this one
        workers.labels("silent").set(0)
        Counter(definitions.WORKER_RESTARTS.name, definitions.WORKER_RESTARTS.text, registry=self._registry)
        tenants = BoundedLabel(settings.max_metrics_tenants)
        keys, api_keys = BoundedLabel(settings.max_metrics_keys), BoundedLabel(settings.max_metrics_keys)
        usage = UsageCollector(targets, models=self._models, tenants=tenants, keys=keys, api_keys=api_keys)
        self._registry.register(usage)
        self._accounts = AccountCollector(targets, settings.max_metrics_accounts)
        self._registry.register(self._accounts)

    def show_accounts(self, most: int) -> None:
        """Give so many accounts of a target gauges of their own from now on: the busiest ones."""
        self._accounts.max_accounts = most

    # --- calls ---

    def record_call(self, target: str, record: CallRecord, status: int) -> None:
        """Record a request for a target whose response has ended, with the status that it counts as."""
        model = self._models.label(record.asked_model)
        has_waited = bool(record.asked_target)  # else it has not asked for a permit
        found = self._of_calls.get((target, model, status))
        if found is None or (has_waited and found[2] is None):
            labels = (target, model, str(status))
            waits = self._child(definitions.WAIT, *labels) if has_waited else None
            requests = self._child(definitions.REQUESTS, target, str(status))
            found = (requests, self._child(definitions.REQUEST_DURATION, *labels), waits)
            self._of_calls[target, model, status] = found
        requests, durations, waits = found
        requests.inc()
        durations.observe(record.duration)
        if has_waited:
            waits.observe(record.waited)

    def count_rejection(self, target: str, limited_by: str) -> None:
        """Count a call that was rejected here, by the limit that rejected it."""
        self._child(definitions.REJECTIONS, target, limited_by).inc()

    def count_fallback(self, target: str, fallback_target: str) -> None:
        """Count a call for `target` that another account has served."""
        self._child(definitions.FALLBACKS, target, fallback_target).inc()

    # --- attempts ---

    def admit(self, operation: Operation, record: CallRecord) -> None:
        """Give the models of a call that a provider has served series of their own, within bounds."""
        self._models.admit(record.asked_model)
        self._models.admit(operation.model)

    def count_retry(self, operation: Operation) -> None:
        """Count an attempt that is a retry."""
        self._child(definitions.RETRIES, operation.target, self._models.label(operation.model)).inc()

    def record_attempt(self, operation: Operation, outcome: CallOutcome, seconds: float, *, error_type: str) -> None:
        """Record an attempt that has ended.

        Args:
            operation: what was sent.
            outcome: how it ended.
            seconds: since it was sent.
            error_type: the status or the kind of an error; empty for a success.
        """
        throttled = outcome.refused_by_limit or outcome.spend_cap
        counted = "throttled" if throttled else _OUTCOMES[outcome.kind]
        target, provider, endpoint, model = operation
        key = (target, provider, endpoint, self._models.label(model), counted, error_type)
        found = self._of_attempts.get(key)
        if found is None:
            attempts = self._child(definitions.ATTEMPTS, target, key[3], counted)
            durations = self._child(definitions.OPERATION_DURATION, *self._provider_labels(operation), error_type)
            found = self._of_attempts[key] = (attempts, durations)
        found[0].inc()
        found[1].observe(seconds)

    def record_stream(self, operation: Operation, first_chunk: float | None, first_token: float | None) -> None:
        """Record when a streaming answer began, in seconds since the call was sent; None for what never came."""
        if first_chunk is not None:
            self._child(definitions.TIME_TO_FIRST_CHUNK, *self._provider_labels(operation)).observe(first_chunk)
        if first_token is not None:
            model = self._models.label(operation.model)
            self._child(definitions.TIME_TO_FIRST_TOKEN, operation.target, model).observe(first_token)

    # --- usage ---

    def record_tokens(self, operation: Operation, usage: Usage) -> None:
        """Record the tokens of a call. The upstream adds them up; see `UsageCollector`."""
        target, provider, endpoint, model = operation
        key = (target, provider, endpoint, self._models.label(model))
        found = self._of_tokens.get(key)
        if found is None:
            labels = self._provider_labels(operation)
            kinds = ("input", "output")
            sent, received = [self._child(definitions.TOKEN_USAGE, *labels, kind) for kind in kinds]
            found = self._of_tokens[key] = (sent, received)
        found[0].observe(usage.input_tokens)
        found[1].observe(usage.output_tokens)

    # --- the page ---

    def count_budget_alert(self, alert: BudgetAlert) -> None:
        """Count an alert: a share of a budget is spent."""
        self._child(definitions.BUDGET_ALERTS, alert.upstream, alert.budget, f"{alert.share:g}").inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def render_for(self, accept: str, snapshot: MetricSnapshot | None = None) -> tuple[bytes, str]:
        """Return all metrics, and their content type: Prometheus's text format, or OpenMetrics where it is accepted.

        Args:
            accept: the Accept header of the request.
            snapshot: other metrics than those of this process: those of all workers; None for its own.
        """
        encode, content_type = choose_encoder(accept)
        if snapshot is None:
            return encode(self._registry), content_type
        registry = CollectorRegistry()
        registry.register(SnapshotCollector(snapshot))
        return encode(registry), content_type

    def snapshot(self) -> MetricSnapshot:
        """Return all metrics of this process as plain data."""
        return take_snapshot(self._registry)

    def _provider_labels(self, operation: Operation) -> tuple[str, ...]:
        endpoint, provider = operation.endpoint, operation.provider
        return (
            operation.target,
            _OPERATIONS.get(endpoint) or endpoint.value,
            _PROVIDERS.get(provider, provider),
            self._models.label(operation.model),
        )

    def _child(self, definition: MetricDefinition, *labels: str) -> Any:
        """Return the counter or histogram with these labels, from a cache: prometheus_client is slower at that."""
        key = (definition.name, *labels)
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = self._metrics[definition.name].labels(*labels)
        return found


def _new_metric(definition: MetricDefinition, registry: CollectorRegistry) -> Counter | Histogram:
    if definition.kind == "counter":
        return Counter(definition.name, definition.text, definition.labels, registry=registry)
    return Histogram(definition.name, definition.text, definition.labels, buckets=definition.buckets, registry=registry)
