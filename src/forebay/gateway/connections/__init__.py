"""Connections to providers, and the requests and heads of responses on them."""
