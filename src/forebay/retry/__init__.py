"""Retries: exponential backoff, the attempts of one call or task, and the retry budget that all callers share."""

from forebay.retry.backoff import Retry
from forebay.retry.retry_budget import RetryBudget, RetryBudgets, RetryPermission
from forebay.retry.retry_state import RetryState

__all__ = ["Retry", "RetryBudget", "RetryBudgets", "RetryPermission", "RetryState"]
