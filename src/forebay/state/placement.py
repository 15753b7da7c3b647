"""Placement: the shard that has a key, by weighted rendezvous hashing.

Each shard draws a number for each key, from a hash of both, and the largest one has it. A shard that is added takes the
keys for which its number is the largest, about 1/(n+1) of them, and no others move.

Source: D. Thaler, C. Ravishankar, "Using name-based mappings to increase hit rates", 1998; weights as in C.
Schindelhauer, G. Schomaker, "Weighted distributed hash tables", 2005: a draw u in (0, 1) counts as -weight / ln(u).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import log

_DIGEST_BYTES = 8
_DRAWS = float(1 << 8 * _DIGEST_BYTES)
_REMEMBERED = 10_000  # keys and namespaces that were placed last


def unit_of(namespace: str, key: bytes) -> bytes:
    """Return what is placed: a key, or all of a namespace."""
    return b"n" + namespace.encode() if namespace else b"k" + key


class Placement:
    """The shards among which keys are placed. It depends on their names and weights only, and not on their order.

    Args:
        weights: the share of each shard, by its name; any positive numbers.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._shards = [
            # The hash is keyed by a digest of the name, because its own key is bounded.
            (name, hashlib.blake2b(digest_size=_DIGEST_BYTES, key=hashlib.blake2b(name.encode()).digest()), weight)
            for name, weight in sorted(weights.items())
        ]
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._draw)

    @property
    def shards(self) -> Sequence[str]:
        """The names of the shards."""
        return [name for name, _, _ in self._shards]

    def shard_of(self, unit: bytes) -> str:
        """Return the name of the shard that has what `unit_of` returns."""
        return self._shards[0][0] if len(self._shards) == 1 else self._remembered(unit)

    def _draw(self, unit: bytes) -> str:
        best, found = -1.0, ""
        for name, seeded, weight in self._shards:
            digest = seeded.copy()
            digest.update(unit)
            draw = (int.from_bytes(digest.digest(), "big") + 0.5) / _DRAWS
            score = -weight / log(draw) if draw < 1.0 else float("inf")
            if score > best:
                best, found = score, name
        return found
