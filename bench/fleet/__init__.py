"""Fleets of agents on one key: their calls, their providers, and the runs over a virtual network or real sockets."""
