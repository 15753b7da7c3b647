"""The reaction to 429s: an account tells a rate from a limit on calls in flight, pauses, and learns the rate."""

from forebay.upstream.accounts.refusals.refusal_control import RefusalControl

__all__ = ["RefusalControl"]
