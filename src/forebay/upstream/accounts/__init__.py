"""The accounts of an upstream: permits, queue, money, and learned estimates."""
