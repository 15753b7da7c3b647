"""The adaptive limit: how many calls may be in flight, learned from outcomes and latency."""
