"""Clients of httpx and httpx2, and SDKs that use them, bound to an upstream: copies whose calls go through it."""

from forebay.upstream.httpx_binding.client_binder import bind_client

__all__ = ["bind_client"]
