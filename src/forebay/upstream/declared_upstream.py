"""The load source of a worker whose upstream was declared, before its first call shows which account it uses."""

from __future__ import annotations

from collections.abc import Sequence

from forebay.interfaces import LoadSource
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.any_of import AnyOf
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback_routes import FallbackResolver


class DeclaredUpstream(AnyOf):
    """The accounts of an upstream as one `LoadSource`, for a worker that will use one of them.

    The API key and the model of the first call show which account it is; then that account replaces this source. Until
    then the least loaded open account counts, those of the upstream's fallbacks included. While no account is open, one
    with the upstream's settings and without calls counts.

    Args:
        core: of the upstream.
        resolver: finds the routes of its fallbacks.
        model: the model of the calls; empty if it is not known.
    """

    def __init__(self, core: UpstreamCore, resolver: FallbackResolver, model: str) -> None:
        group = core.settings.model_group(model) if model else ""
        super().__init__(":".join(part for part in ("upstream", core.name, group) if part), self._open_accounts)
        self._core = core
        self._resolver = resolver
        self._model = model

    def covers(self, source: LoadSource) -> bool:
        """Return whether `source`, which a run has called, belongs to the declared upstream and model."""
        return source.accounts[0] in self._core.accounts.accounts_of(self._model)

    def _open_accounts(self) -> Sequence[ThreadSafeAccount]:
        found = dict.fromkeys(self._core.accounts.accounts_of(self._model))
        for route in self._resolver.routes(self._model):
            found |= dict.fromkeys(route.core.accounts.accounts_of(route.model))
        return list(found)
