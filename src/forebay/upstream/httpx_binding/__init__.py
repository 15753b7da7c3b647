"""Calls of clients that exist, sent through an upstream: transports for httpx and httpx2, and copies that use them."""

from forebay.upstream.httpx_binding.client_binder import bind_client

__all__ = ["bind_client"]
