"""Quotas and budgets: rates that refill, money that runs out, and prices. Reserved before a call, settled after it."""

from forebay.quota.budget import Budget, BudgetReservation, BudgetTracker, check_dollars
from forebay.quota.prices import BilledUsage, Price, Prices
from forebay.quota.quota import Quota, RateScope, check_quotas
from forebay.quota.rate_limiter import HeldCharge, QuotaDelay, QuotaHeadroom, QuotaLevel, QuotaReservation, RateLimiter

__all__ = [
    "BilledUsage",
    "Budget",
    "BudgetReservation",
    "BudgetTracker",
    "HeldCharge",
    "Price",
    "Prices",
    "Quota",
    "QuotaDelay",
    "QuotaHeadroom",
    "QuotaLevel",
    "QuotaReservation",
    "RateLimiter",
    "RateScope",
    "check_dollars",
    "check_quotas",
]
