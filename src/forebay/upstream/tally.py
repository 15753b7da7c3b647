"""What the attempts at an account's calls came to since it was opened: running totals, for its statistics."""

from __future__ import annotations

import msgspec


class Tally(msgspec.Struct):
    """See `forebay.upstream.statistics.AccountStatistics`."""

    sent: int = 0
    succeeded: int = 0
    turned_away: int = 0
    failed: int = 0
    unattributed: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
