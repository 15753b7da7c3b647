"""The call plane: dependencies that agents share and can overload, such as a provider's account.

`accounts` decides which calls may be sent, `fallbacks` finds other accounts for them, `providers` knows the APIs, and
`httpx_binding` binds clients. The steps of a call of a bound client, from the client to the socket:

1. ``AsyncTransport.handle_async_request`` (`httpx_binding/httpx_transport.py`): takes the request from httpx.
2. ``BoundExchange`` (`httpx_binding/bound_exchange.py`): reads its bytes and headers from the HTTP library.
3. ``Exchange`` (`exchange.py`): reads what the request asks for and needs, by the provider's profile.
4. ``AccountRegistry.account`` (`accounts/account_registry.py`): finds the account, by API key and model.
5. ``UpstreamCore.request`` (`core.py`): adds priority, deadline and tenant of the running task, and the expected cost.
6. ``CallRunner.run`` (`call_flow.py`): drives the flow on the event loop.
7. ``call_flow`` (`call_flow.py`): decides over retry and fallback.
8. ``ThreadSafeAccount.acquire`` (`accounts/thread_safe_account.py`): returns a permit, or waits for it in the call
   queue.
9. ``Account.try_acquire`` (`accounts/account.py`): decides over slot, quotas, money and breaker.
10. ``AsyncTransport._send`` (`httpx_binding/httpx_transport.py`): sends one attempt.
11. The client's own transport: writes to the socket.

A request by `Upstream.send` (`HttpCall`) and the gateway (`ForwardedCall`) enter at step 3, a guarded function and a
permit by `Upstream.call` at step 6. They differ only in how they send.

The steps after an attempt, for example one that the provider answered with 429 and Retry-After:

1. ``Exchange.judge_answer`` (`exchange.py`): reads status, Retry-After and rate limit headers of a complete answer.
2. ``classify`` (`providers/classify.py`): finds the kind of an error, by its body, its headers and its status.
3. ``judge_error_answer`` (`failed_attempts.py`): makes of the kind a result for the flow and an outcome.
4. ``_Retrying.next_permit`` (`call_flow.py`): decides whether the call is retried, and releases the permit.
5. ``Account.settle`` (`accounts/account.py`): reports the outcome to limit, outage detector, budgets and breaker.
6. ``RefusalControl.record_refused`` (`accounts/refusals/refusal_control.py`): pauses the account's calls, for a 429.
7. ``Sleep`` (`call_flow.py`): waits outside of the call queue, for Retry-After or a backoff.
8. ``AccountRetries.request_retry`` (`accounts/account_retries.py`): asks the retry budget for throttled calls.
9. ``ThreadSafeAccount.acquire`` (`accounts/thread_safe_account.py`): asks for a permit again, at the head of its
   priority.

Where step 4 gives up, or step 9 rejects the retry, the next account of the ``FallbackChain`` is tried, if there is one.
"""

from forebay.upstream.fallbacks.fallback import Fallback
from forebay.upstream.http_call import HttpRequest, HttpResponse
from forebay.upstream.provider_key_limits import ProviderKeyLimits
from forebay.upstream.upstream import Upstream

__all__ = ["Fallback", "HttpRequest", "HttpResponse", "ProviderKeyLimits", "Upstream"]
