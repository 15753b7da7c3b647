"""Retries: how long one waits, whether there is one, and how many all callers together may make."""

from forebay.retry.backoff import Retry
from forebay.retry.retry_budget import RetryBudget, RetryBudgets, RetryPermission
from forebay.retry.retry_state import RetryState

__all__ = ["Retry", "RetryBudget", "RetryBudgets", "RetryPermission", "RetryState"]
