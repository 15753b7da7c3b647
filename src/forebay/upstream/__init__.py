"""The call plane: dependencies that agents share and can overload, such as a provider's account.

`accounts` decides which calls may be sent, `fallbacks` finds other accounts for them, `providers` knows the APIs, and
`httpx_binding` binds clients. The steps of a call of a bound client, from the client to the socket:

1. ``AsyncTransport.handle_async_request`` (`httpx_binding/httpx_transport.py`): takes the request from httpx.
2. ``BoundExchange`` (`httpx_binding/bound_exchange.py`): reads its bytes and headers from the HTTP library.
3. ``Exchange`` (`exchange.py`): parses the request, and estimates its needs, by the provider's profile.
4. ``AccountRegistry.account`` (`accounts/account_registry.py`): finds the account, by API key and model.
5. ``UpstreamCore.request`` (`core.py`): adds priority, deadline and tenant of the running task, and the cost.
6. ``CallRunner.run`` (`call_flow.py`): drives the flow on the event loop.
7. ``call_flow`` (`call_flow.py`): retry and fallback.
8. ``SharedAccount.acquire`` (`accounts/shared_account.py`): takes the lock, or waits.
9. ``Account.try_acquire`` (`accounts/account.py`): decides over slot, quotas, money and breaker.
10. ``AsyncTransport._send``: sends one attempt; ``Exchange.judge_answer`` returns its result.
11. The client's own transport, and the socket.

A guarded function, a permit by `Upstream.call`, a request by `Upstream.send` and the gateway enter at step 6. They
differ only in how they send.
"""

from forebay.upstream.fallbacks.fallback import Fallback
from forebay.upstream.http_call import HttpRequest, HttpResponse
from forebay.upstream.upstream import Upstream

__all__ = ["Fallback", "HttpRequest", "HttpResponse", "Upstream"]
