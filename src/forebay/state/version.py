"""The versions of entries: numbers that grow, and that no key ever has twice."""

from __future__ import annotations


def next_version(last: int, wall_time: float) -> int:
    """Return the version of the next write of a shard.

    It is larger than that of any earlier write there, and at least the microseconds since the epoch: so versions do not
    repeat either where the last one has been lost, with a server's memory or at a failover.

    Args:
        last: the version of the last write of the shard; 0: not known.
        wall_time: epoch seconds.
    """
    return max(last + 1, int(wall_time * 1_000_000))
