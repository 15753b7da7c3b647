"""A shard in memory that outlives the states that use it, as a server does."""

from __future__ import annotations

from forebay.state import MemoryShard


class KeptShard(MemoryShard):
    """A shard in memory that keeps its entries when a state is closed."""

    async def close(self) -> None:
        """Do nothing."""
