"""The API keys of a gateway's callers that their provider has accepted: only their calls may use a fallback's key."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final

from forebay.upstream.providers.credentials import normalize_credential

_MAX_KEYS: Final = 10_000  # a key that is forgotten has to be accepted again first


class AcceptedKeys:
    """The API keys that the provider of an upstream has accepted last. Bounded, and safe to use from any thread.

    Keys that were not accepted are not in it, so that no list of junk keys fills it.
    """

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The keys are as good for the child."""
        self._lock = threading.Lock()

    def __contains__(self, credential: str) -> bool:
        return _digest(credential) in self._digests

    def record(self, credential: str, *, accepted: bool) -> None:
        """Note whether the provider has accepted a key.

        Args:
            credential: the header with the key.
            accepted: False if it has refused the key (401, 403).
        """
        digest = _digest(credential)
        with self._lock:
            self._digests.pop(digest, None)
            if accepted:
                self._digests[digest] = None
                if len(self._digests) > _MAX_KEYS:
                    self._digests.popitem(last=False)


def _digest(credential: str) -> bytes:
    return hashlib.sha256(normalize_credential(credential).encode()).digest()
