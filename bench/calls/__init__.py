"""Calls to a simulated provider under a limit, without asyncio: ten simulated minutes take a second."""
