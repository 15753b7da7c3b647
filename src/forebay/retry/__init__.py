"""Retries: how long one waits, whether there may be one, and how many all callers together may make."""

from forebay.retry.attempts import Attempts
from forebay.retry.backoff import Retry
from forebay.retry.budget import Leave, RetryBudget, RetryBudgets

__all__ = ["Attempts", "Leave", "Retry", "RetryBudget", "RetryBudgets"]
