"""The price list, loaded in a thread before the first call that may need it, so that the event loop goes on meanwhile.

Loading takes a third of a second. A call waits for it before it is prepared, so none is priced without the list.
"""

from __future__ import annotations

import asyncio
from typing import Final

from forebay import clock
from forebay._threads import DaemonThreadExecutor
from forebay.quota.prices import is_price_list_loaded, load_price_list
from forebay.upstream.core import UpstreamCore

_executor: Final = DaemonThreadExecutor("forebay-prices", max_threads=1)  # the second job finds the list loaded


async def load_prices(core: UpstreamCore, *, may_fall_back: bool) -> None:
    """Wait until the price list is loaded, if calls of an upstream may need it.

    Args:
        core: of the upstream.
        may_fall_back: calls may go to other upstreams, whose prices are others.
    """
    if is_price_list_loaded() or (core.prices.cover_all_models and not may_fall_back):
        return
    if clock.running_virtual_loop() is not None:  # nothing waits for real time there
        load_price_list()
        return
    await asyncio.get_running_loop().run_in_executor(_executor, load_price_list)
