"""Targets of calls: providers, their keys, and pools of both."""
