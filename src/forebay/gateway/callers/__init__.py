"""Callers of the gateway: keys issued to them, tenants, and what each of them may use."""
