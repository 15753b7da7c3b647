"""The processes of the gateway benchmark: a provider that answers at once, the gateway, and the load."""
