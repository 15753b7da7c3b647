"""What the attempts at an account's calls came to since it was opened: running totals, for its statistics."""

from __future__ import annotations

import msgspec


class CallCounts(msgspec.Struct):
    """See `forebay.upstream.upstream_statistics.AccountStatistics`."""

    sent: int = 0
    succeeded: int = 0
    throttled: int = 0
    failed: int = 0
    unattributed: int = 0
    rejected: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
