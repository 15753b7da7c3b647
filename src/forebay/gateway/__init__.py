"""The gateway: the call plane for other processes and languages, which change nothing but a base URL."""

from forebay.gateway.secret import InvalidSecret
from forebay.gateway.settings import ContextSettings, GatewaySettings, QuotaSettings, TargetSettings

__all__ = ["ContextSettings", "GatewaySettings", "InvalidSecret", "QuotaSettings", "TargetSettings"]
