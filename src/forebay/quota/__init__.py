"""Quotas and money: rates that refill, budgets that run out, and prices; reserved before a call, settled after it."""

from forebay.quota.budget import Budget, Purse, Sum, check_dollars
from forebay.quota.prices import Price, Prices
from forebay.quota.quota import Quota
from forebay.quota.quotas import Delay, Level, Quotas, Reservation, Spare

__all__ = [
    "Budget",
    "Delay",
    "Level",
    "Price",
    "Prices",
    "Purse",
    "Quota",
    "Quotas",
    "Reservation",
    "Spare",
    "Sum",
    "check_dollars",
]
