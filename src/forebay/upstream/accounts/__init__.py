"""The accounts of an upstream: permits, queue, money, and what each account has learned."""
