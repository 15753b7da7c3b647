"""The call plane: what agents share and can overload, such as a provider's account."""

from forebay.upstream.fallback import Fallback
from forebay.upstream.upstream import Upstream

__all__ = ["Fallback", "Upstream"]
