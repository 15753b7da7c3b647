"""What the gateway is measured beside: a provider that answers at once, and proxies that pass everything on."""
